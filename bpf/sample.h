/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Poisson sampling by bytes. User space gives the probability of each size
 * bucket; the record keeps the probability it was taken with, so that any table
 * whatever gives unbiased sums (weight = 1/p with the same p).
 */
#ifndef ALLOCSNOOP_SAMPLE_H
#define ALLOCSNOOP_SAMPLE_H

/* probability of a block to be taken, by size bucket; ALWAYS in exact mode */
volatile __u32 sample_prob[PROB_BUCKETS] = {};
/* 0: every block is taken, and unknown blocks come from before the trace */
volatile __u32 sampling = 0;
/* sampling may be begun here, when the live map is full: sample_prob is filled */
volatile __u32 may_sample = 0;
/* entries of the live map that user space keeps for blocks that are sampled while it thins the map */
volatile __u32 live_reserve = 0;
/* user space has been asked to thin the live map, and is at it */
volatile __u32 thinning = 0;

static __always_inline __u32 log2_of(__u64 v)
{
	__u32 r = 0;

	if (v >> 32) {
		v >>= 32;
		r += 32;
	}
	if (v >> 16) {
		v >>= 16;
		r += 16;
	}
	if (v >> 8) {
		v >>= 8;
		r += 8;
	}
	if (v >> 4) {
		v >>= 4;
		r += 4;
	}
	if (v >> 2) {
		v >>= 2;
		r += 2;
	}
	return r + (v >> 1);
}

/* 32 linear buckets, then 32 for each power of two; tracer/sample.go has the inverse. */
static __always_inline __u32 size_bucket(__u64 size)
{
	__u32 shift;

	if (size < 32)
		return size;
	shift = log2_of(size) - 5;
	return ((shift + 1) << 5) + ((size >> shift) & 31);
}

/* sample decides whether a block is taken: its probability, or 0 when it is not. */
static __always_inline __u32 sample(struct thread *t, __u64 size)
{
	__u32 prob;
	__u64 x;

	if (!sampling)
		return ALWAYS;
	prob = sample_prob[size_bucket(size) & (PROB_BUCKETS - 1)];
	if (prob == ALWAYS)
		return prob;
	x = t->random;
	if (!x)
		x = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	t->random = x;
	return (__u32)(x * 0x2545F4914F6CDD1DULL >> 32) < prob ? prob : 0;
}

/* retake decides by chance about a block that had been taken for certain. */
static __always_inline bool retake(struct block *b)
{
	b->prob = sample_prob[size_bucket(b->size) & (PROB_BUCKETS - 1)];
	return b->prob == ALWAYS || bpf_get_prandom_u32() < b->prob;
}

#endif
