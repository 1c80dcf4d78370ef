package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
)

// series is the numbered profiles of --interval, --at and --on-oom.
type series struct {
	base    string
	keep    int
	written []string
}

// write adds the next profile and removes the oldest beyond keep.
func (s *series) write(r *traceRun, e extras) error {
	snapshot, err := r.finish(e)
	if err != nil {
		return err
	}
	name := siblingName(s.base, fmt.Sprintf("%04d", len(s.written)+1))
	if err := writeProfile(snapshot, name); err != nil {
		return err
	}
	s.written = append(s.written, name)
	if s.keep == 0 || len(s.written) <= s.keep {
		return nil
	}
	old := s.written[len(s.written)-s.keep-1]
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old profile: %w", err)
	}
	return nil
}

// siblingName puts something before a profile's ending: FILE.0001.pb.gz.
func siblingName(base, what string) string {
	stem, ok := strings.CutSuffix(base, ".pb.gz")
	if !ok {
		return base + "." + what
	}
	return stem + "." + what + ".pb.gz"
}

func writeProfile(s *profile.Snapshot, name string) error {
	out, err := createOutput(name)
	if err != nil {
		return err
	}
	defer out.discard()
	if err := profile.Write(out, s); err != nil {
		return fmt.Errorf("write profile: %w", err)
	}
	return out.commit()
}

// writePerProcess writes one profile for each process of a snapshot.
func writePerProcess(s *profile.Snapshot, base string) error {
	done := map[int]bool{}
	for _, p := range s.Processes {
		if done[p.PID] {
			continue // an earlier image of the same process
		}
		done[p.PID] = true
		if err := writeProfile(onlyProcess(s, p.PID), siblingName(base, fmt.Sprint(p.PID))); err != nil {
			return err
		}
	}
	return nil
}

// onlyProcess is a snapshot of one of its processes.
func onlyProcess(s *profile.Snapshot, pid int) *profile.Snapshot {
	one := *s
	one.Processes, one.Stacks = nil, nil
	for _, p := range s.Processes {
		if p.PID == pid {
			one.Processes = append(one.Processes, p)
		}
	}
	for _, st := range s.Stacks {
		if st.PID == pid {
			one.Stacks = append(one.Stacks, st)
		}
	}
	return &one
}
