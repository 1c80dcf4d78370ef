package tracer

import (
	"fmt"
	"time"

	"github.com/allocsnoop/allocsnoop/bpf"
)

// audit checks the books while they are kept: what a stack has allocated less what it has freed is the sum of its blocks in
// use, to the last digit. A row that does not add up is a fault of allocsnoop.
//
// The trap: a row and its blocks are not changed at one time. So a row counts as wrong only when it did not change while the
// blocks were walked, when no realloc under way holds a block of it, and when a second look, a second or more later, finds
// the very same. Once the probes are out, nothing moves, and the first look is enough.
type audit struct {
	suspects map[bpf.RowKey]suspect
	wrong    map[bpf.RowKey]bool
	next     time.Time
}

type suspect struct {
	row   bpf.Row
	off   held
	since time.Time
}

// held is of blocks in use, in the units of a row; wrapping differences are exact.
type held struct{ objects, bytes uint64 }

func (s held) with(b *bpf.Block) held {
	return held{s.objects + weight(b.Prob), s.bytes + weightedBytes(b.Size, b.Prob)}
}

const (
	confirmAfter = time.Second
	// auditShare of one core is what checks may cost at most.
	auditShare = 0.01
	booksWrong = "books_mismatch"
)

// Check audits the books when that is due again. It is to be called often.
func (t *Tracer) Check() error {
	t.mu.Lock()
	now := time.Now()
	due := t.options.Mode != Growth && t.stopped.IsZero() && !now.Before(t.audit.next)
	first := t.audit.next.IsZero()
	t.audit.next = now.Add(t.options.CheckEvery)
	t.mu.Unlock()
	if !due || first {
		return nil
	}
	t.thinning.Lock()
	defer t.thinning.Unlock()
	rows, err := t.readRows()
	if err != nil {
		return err
	}
	sums := map[bpf.RowKey]held{}
	err = eachEntry(t.programs.Live, func(k *bpf.LiveKey, b *bpf.Block) {
		row := rowOf(k, b)
		sums[row] = sums[row].with(b)
	})
	if err != nil {
		return fmt.Errorf("walk the blocks in use: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.compare(rows, sums)
	took := time.Since(now)
	t.audit.next = now.Add(max(t.options.CheckEvery, time.Duration(float64(took)/auditShare)))
	return nil
}

// rowOf is the row that a block is in.
func rowOf(k *bpf.LiveKey, b *bpf.Block) bpf.RowKey {
	return bpf.RowKey{Proc: k.Proc, Stack: b.Stack, Kind: uint32(k.Addr >> kindShift)}
}

// compare finds the rows that do not add up. The caller holds thinning, so that no weight changes, and mu.
func (t *Tracer) compare(rows map[bpf.RowKey]bpf.Row, sums map[bpf.RowKey]held) {
	if t.count(bpf.CurrentCounterCOUNT_ROWS_LOST) > 0 {
		return // such blocks are in no row, which was said
	}
	now := time.Now()
	suspects := map[bpf.RowKey]suspect{}
	for k, row := range rows {
		a := t.adjustments[k]
		off := held{
			row.AllocObjects + uint64(a.objects) - row.FreeObjects - sums[k].objects,
			row.AllocBytes + uint64(a.bytes) - row.FreeBytes - sums[k].bytes,
		}
		if off == (held{}) || row.Taken != 0 || !t.still(k, row) {
			continue
		}
		s := suspect{figures(row), off, now}
		if before, ok := t.audit.suspects[k]; ok && before.row == s.row && before.off == off {
			s.since = before.since
		}
		if !t.stopped.IsZero() || now.Sub(s.since) >= confirmAfter {
			t.audit.wrong[k] = true
		}
		suspects[k] = s
	}
	t.audit.suspects = suspects
}

// still tells whether a row has not changed since it was read.
func (t *Tracer) still(k bpf.RowKey, row bpf.Row) bool {
	var again bpf.Row
	err := t.programs.RowsOfStacks.Lookup(k, &again)
	return err == nil && figures(again) == figures(row)
}

// figures is a row without what is no part of its book.
func figures(r bpf.Row) bpf.Row {
	r.Sent = 0
	return r
}
