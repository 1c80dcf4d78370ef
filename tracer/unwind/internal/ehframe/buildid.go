package ehframe

import (
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"io"
)

// maxNotes bounds the notes read for a build-id.
const maxNotes = 1 << 16

// BuildID is the GNU build-id in lower-case hex, "" when the file has none.
func BuildID(r io.ReaderAt) string {
	f, err := elf.NewFile(r)
	if err != nil {
		return ""
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > maxNotes {
			continue
		}
		b := make([]byte, p.Filesz)
		n, _ := p.ReadAt(b, 0)
		if id := buildIDNote(b[:n]); id != "" {
			return id
		}
	}
	return ""
}

func buildIDNote(b []byte) string {
	const gnuBuildID = 3
	for len(b) >= 12 {
		name, desc, kind := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:])
		b = b[12:]
		nameEnd, descSize := (uint64(name)+3)&^3, (uint64(desc)+3)&^3
		if nameEnd+descSize > uint64(len(b)) {
			// the last note may lack its padding
			if nameEnd+uint64(desc) > uint64(len(b)) {
				return ""
			}
			descSize = uint64(desc)
		}
		if kind == gnuBuildID && name == 4 && string(b[:4]) == "GNU\x00" {
			return hex.EncodeToString(b[nameEnd : nameEnd+uint64(desc)])
		}
		b = b[nameEnd+descSize:]
	}
	return ""
}
