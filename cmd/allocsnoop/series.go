package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
)

// series is the numbered profiles of --interval.
type series struct {
	base    string
	keep    int
	written []string
}

// write adds the next profile and removes the oldest beyond keep.
func (s *series) write(r *traceRun) error {
	snapshot, err := r.finish()
	if err != nil {
		return err
	}
	stem, ok := strings.CutSuffix(s.base, ".pb.gz")
	suffix := ".pb.gz"
	if !ok {
		suffix = ""
	}
	out, err := createOutput(fmt.Sprintf("%s.%04d%s", stem, len(s.written)+1, suffix))
	if err != nil {
		return err
	}
	defer out.discard()
	if err := profile.Write(out, snapshot); err != nil {
		return fmt.Errorf("write profile: %w", err)
	}
	if err := out.commit(); err != nil {
		return err
	}
	s.written = append(s.written, out.name)
	if s.keep == 0 || len(s.written) <= s.keep {
		return nil
	}
	old := s.written[len(s.written)-s.keep-1]
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old profile: %w", err)
	}
	return nil
}
