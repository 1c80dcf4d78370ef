package oom

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// maxLine bounds a line of a text log; the kernel's own are below 1,024 bytes.
const maxLine = 64 << 10

// Read finds the kills in a text log.
func Read(r io.Reader, now time.Time, found func(*Kill) error) error {
	var p Parser
	in := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) { // no line of the kernel's: skip its pieces
			continue
		}
		if kill, ok := p.Add(ParseLine(string(line), now)); ok {
			if err := found(kill); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
	}
}

// Kmsg is the kernel's log of this machine.
type Kmsg struct {
	fd int
	// Lost counts the times that the kernel dropped lines before they were read.
	Lost int
}

// OpenKmsg opens /dev/kmsg at its oldest line.
func OpenKmsg() (*Kmsg, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/kmsg: %w", err)
	}
	return &Kmsg{fd: fd}, nil
}

// Close closes it. It must not be in use.
func (k *Kmsg) Close() error { return unix.Close(k.fd) }

// SeekEnd skips what the log holds.
func (k *Kmsg) SeekEnd() error {
	_, err := unix.Seek(k.fd, 0, io.SeekEnd)
	return err
}

// Kills calls found for each kill in the log and returns at its end, or with follow when the context ends.
func (k *Kmsg) Kills(ctx context.Context, follow bool, found func(*Kill) error) error {
	var p Parser
	buf := make([]byte, 8192)
	for ctx.Err() == nil {
		n, err := unix.Read(k.fd, buf) // one record
		switch err {
		case nil:
		case unix.EPIPE:
			k.Lost++
			continue
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if !follow {
				return nil
			}
			if err := k.wait(); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("read /dev/kmsg: %w", err)
		}
		line, ok := parseRecord(string(buf[:n]))
		if !ok {
			continue
		}
		line.Time = wallTime(line.Uptime)
		if kill, ok := p.Add(line); ok {
			if err := found(kill); err != nil {
				return err
			}
		}
	}
	return nil
}

// wait waits for a record, but not so long that the end of a context goes unnoticed.
func (k *Kmsg) wait() error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(k.fd), Events: unix.POLLIN}}, 200)
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("wait for /dev/kmsg: %w", err)
	}
	return nil
}

// wallTime is the time of an uptime. The log's clock stands still in suspend, so that it is wrong by the later suspends.
func wallTime(uptime time.Duration) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(uptime - time.Duration(now.Nano())).Round(time.Millisecond)
}
