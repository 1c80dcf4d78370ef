package target

import (
	"debug/elf"
	"encoding/hex"
	"io"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// hasBuild says whether the file behind a range has the build-id, or one that begins so. Of a file that cannot be read
// it is not said.
func (f *Finder) hasBuild(pid int, r *memory.Range, wanted string) bool {
	if wanted == "" {
		return true
	}
	file, err := f.fs.OpenMapped(pid, r)
	if err != nil {
		return false
	}
	defer file.Close()
	return strings.HasPrefix(buildID(file), wanted)
}

// maxNotes bounds a note segment: real ones have some hundred bytes.
const maxNotes = 64 << 10

// buildID is the GNU build-id of an ELF file in hex; empty when it has none or is damaged.
func buildID(r io.ReaderAt) string {
	f, err := elf.NewFile(r)
	if err != nil {
		return ""
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > maxNotes {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err != nil {
			continue
		}
		if id := gnuBuildID(f, notes); id != "" {
			return id
		}
	}
	return ""
}

// gnuBuildID walks notes: three words (name size, data size, type), then name and data, each padded to four bytes.
func gnuBuildID(f *elf.File, notes []byte) string {
	const typeBuildID = 3
	for len(notes) >= 12 {
		nameSize, size := uint64(f.ByteOrder.Uint32(notes)), uint64(f.ByteOrder.Uint32(notes[4:]))
		kind := f.ByteOrder.Uint32(notes[8:])
		data := 12 + (nameSize+3)&^3
		end := data + size
		if end > uint64(len(notes)) {
			return ""
		}
		if kind == typeBuildID && nameSize == 4 && string(notes[12:16]) == "GNU\x00" {
			return hex.EncodeToString(notes[data:end])
		}
		notes = notes[min((end+3)&^3, uint64(len(notes))):]
	}
	return ""
}
