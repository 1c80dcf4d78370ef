package profile

import (
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"time"
)

// The packed rest of a sample, what pprof has no place for: varints as encoding/binary writes them.
//
//	pid, flags
//	label       index into labels            if packLabel
//	variances   objects, bytes: 8 bytes each if packVariance (IEEE 754, little-endian)
//	ages        min, median, max, old        if packAges
//	history     count, then per point the differences to the point before: ns, allocated objects and bytes, freed ones
const (
	packCut = 1 << iota
	packLabel
	packVariance
	packAges
)

// pack adds a stack to what will be the record's second comment.
func (r *record) pack(s *Stack) {
	b := binary.AppendVarint(r.stacks, int64(s.PID))
	objects, bytes := finite(s.InUseObjectsVar), finite(s.InUseBytesVar)
	var flags uint64
	for flag, set := range map[uint64]bool{packCut: !s.Complete, packLabel: s.Label != "", packVariance: objects != 0 || bytes != 0, packAges: s.Ages != nil} {
		if set {
			flags |= flag
		}
	}
	b = binary.AppendUvarint(b, flags)
	if s.Label != "" {
		b = binary.AppendUvarint(b, uint64(r.label(s.Label)))
	}
	if flags&packVariance != 0 {
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(objects))
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(bytes))
	}
	if a := s.Ages; a != nil {
		for _, v := range []int64{int64(a.Min), int64(a.Median), int64(a.Max), a.Old} {
			b = binary.AppendVarint(b, v)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(s.History)))
	var last Point
	for _, p := range s.History {
		b = binary.AppendVarint(b, int64(p.At-last.At))
		b = binary.AppendVarint(b, p.AllocObjects-last.AllocObjects)
		b = binary.AppendVarint(b, p.AllocBytes-last.AllocBytes)
		b = binary.AppendVarint(b, p.FreeObjects-last.FreeObjects)
		b = binary.AppendVarint(b, p.FreeBytes-last.FreeBytes)
		last = p
	}
	r.stacks = b
}

func (r *record) label(text string) int {
	if i := slices.Index(r.Labels, text); i >= 0 {
		return i
	}
	r.Labels = append(r.Labels, text)
	return len(r.Labels) - 1
}

var errPacked = errors.New("damaged course of the stacks")

// unpack fills what pack kept of each stack.
func (r *record) unpack(stacks []Stack) error {
	data, err := base64.StdEncoding.DecodeString(r.packed)
	if err != nil {
		return errPacked
	}
	u, blocks := unpacker{data: data, labels: r.Labels}, unpacker{data: r.Blocks}
	for i := range stacks {
		u.fill(&stacks[i])
		stacks[i].Content = r.Contents[i]
		if r.HasBlocks {
			stacks[i].Blocks = blocks.blocks()
		}
	}
	return cmp.Or(u.err, blocks.err)
}

// unpacker reads what pack wrote. The first error sticks, and everything after it is zero.
type unpacker struct {
	data   []byte
	labels []string
	room   []Point // for the next histories
	err    error
}

func (u *unpacker) varint() int64 {
	v, n := binary.Varint(u.data)
	return int64(u.skip(uint64(v), n))
}

func (u *unpacker) uvarint() uint64 {
	v, n := binary.Uvarint(u.data)
	return u.skip(v, n)
}

func (u *unpacker) skip(v uint64, n int) uint64 {
	if n <= 0 {
		u.err, u.data = errPacked, nil
		return 0
	}
	u.data = u.data[n:]
	return v
}

func (u *unpacker) float() float64 {
	if len(u.data) < 8 {
		u.err, u.data = errPacked, nil
		return 0
	}
	v := math.Float64frombits(binary.LittleEndian.Uint64(u.data))
	u.data = u.data[8:]
	return finite(v)
}

// pointsAtOnce is how many points are allocated together; one history each would cost a third of the time to open a file.
const pointsAtOnce = 4096

func (u *unpacker) fill(s *Stack) {
	s.PID = int(u.varint())
	flags := u.uvarint()
	s.Complete = flags&packCut == 0
	if flags&packLabel != 0 {
		if i := u.uvarint(); i < uint64(len(u.labels)) {
			s.Label = u.labels[i]
		} else {
			u.err = errPacked
		}
	}
	if flags&packVariance != 0 {
		s.InUseObjectsVar, s.InUseBytesVar = u.float(), u.float()
	}
	if flags&packAges != 0 {
		s.Ages = &Ages{time.Duration(u.varint()), time.Duration(u.varint()), time.Duration(u.varint()), u.varint()}
	}
	n := u.uvarint()
	if n > uint64(len(u.data))/5 { // each point takes at least five bytes
		u.err = errPacked
		return
	}
	if n == 0 {
		return
	}
	if uint64(len(u.room)) < n {
		u.room = make([]Point, max(n, pointsAtOnce))
	}
	s.History, u.room = u.room[:n:n], u.room[n:]
	var p Point
	for i := range s.History {
		p.At += time.Duration(u.varint())
		p.AllocObjects += u.varint()
		p.AllocBytes += u.varint()
		p.FreeObjects += u.varint()
		p.FreeBytes += u.varint()
		s.History[i] = p
	}
}

// packBlocks appends the blocks of one sample: their count, then of each the distance from the one before, the size times
// two, plus one where a weight follows (IEEE 754, 8 bytes).
func packBlocks(b []byte, blocks []Block) []byte {
	b = binary.AppendUvarint(b, uint64(len(blocks)))
	last := uint64(0)
	for _, block := range blocks {
		weighted := uint64(0)
		if block.Weight != 1 {
			weighted = 1
		}
		b = binary.AppendUvarint(b, block.Addr-last)
		b = binary.AppendUvarint(b, min(block.Size, 1<<62)<<1|weighted)
		if weighted != 0 {
			b = binary.LittleEndian.AppendUint64(b, math.Float64bits(finite(block.Weight)))
		}
		last = block.Addr
	}
	return b
}

func (u *unpacker) blocks() []Block {
	n := u.uvarint()
	if n > uint64(len(u.data))/2 { // each takes at least two bytes
		u.err = errPacked
		return nil
	}
	if n == 0 {
		return nil
	}
	blocks := make([]Block, n)
	addr := uint64(0)
	for i := range blocks {
		addr += u.uvarint()
		size := u.uvarint()
		blocks[i] = Block{addr, size >> 1, 1}
		if size&1 != 0 {
			blocks[i].Weight = u.float()
		}
	}
	return blocks
}
