package tracer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/allocsnoop/allocsnoop/bpf"
)

// readers carry the two ring buffers into the tracer: the frames of new stacks, and what becomes of mappings and processes.
type readers struct {
	frames, events *feed
}

// feed reads one ring buffer in a goroutine.
type feed struct {
	reader *ringbuf.Reader
	handle func([]byte)
	wg     sync.WaitGroup

	mu      sync.Mutex // held while a flush is under way
	flushed chan struct{}
}

func startReaders(t *Tracer) (*readers, error) {
	frames, err := startFeed(t.programs.Frames, t.addStack)
	if err != nil {
		return nil, err
	}
	events, err := startFeed(t.programs.Events, t.onEvent)
	if err != nil {
		return nil, errors.Join(err, frames.Close())
	}
	return &readers{frames, events}, nil
}

func startFeed(m *ebpf.Map, handle func([]byte)) (*feed, error) {
	reader, err := ringbuf.NewReader(m)
	if err != nil {
		return nil, fmt.Errorf("read ring buffer: %w", err)
	}
	f := &feed{reader: reader, handle: handle, flushed: make(chan struct{})}
	f.wg.Go(f.run)
	return f, nil
}

func (f *feed) run() {
	var rec ringbuf.Record
	for {
		err := f.reader.ReadInto(&rec)
		switch {
		case err == nil:
			f.handle(rec.RawSample)
		case errors.Is(err, ringbuf.ErrFlushed):
			f.flushed <- struct{}{}
		case errors.Is(err, os.ErrClosed):
			close(f.flushed)
			return
		}
	}
}

// flush returns once everything that was in the buffer has been handled.
func (f *feed) flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.reader.Flush(); err != nil {
		return fmt.Errorf("flush ring buffer: %w", err)
	}
	<-f.flushed
	return nil
}

func (f *feed) Close() error {
	err := f.reader.Close()
	f.wg.Wait()
	return err
}

// flush drains both buffers. Not to be called with Tracer.mu held: the handlers take it.
func (r *readers) flush() error { return errors.Join(r.events.flush(), r.frames.flush()) }

func (r *readers) Close() error { return errors.Join(r.frames.Close(), r.events.Close()) }

// stackKey names a stack: its frames are addresses of one image of one process.
type stackKey struct{ proc, hash uint64 }

type stack struct {
	end    uint32
	frames []uint64
}

func (t *Tracer) addStack(raw []byte) {
	const head = int(unsafe.Sizeof(bpf.StackHead{}))
	if len(raw) < head {
		return
	}
	h := *(*bpf.StackHead)(unsafe.Pointer(unsafe.SliceData(raw)))
	s := &stack{end: h.End}
	for b := raw[head:]; len(b) >= 8 && len(s.frames) < int(h.N); b = b[8:] {
		s.frames = append(s.frames, binary.NativeEndian.Uint64(b))
	}
	t.mu.Lock()
	t.stacks[stackKey{h.Proc, h.Hash}] = s
	t.mu.Unlock()
}
