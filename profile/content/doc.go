// Package content says what is in the bytes of memory blocks: their shape (JSON with which keys, HTTP, a certificate, a C++
// object of which class, ...), samples, and the strings that occur most. It never touches the operating system and keeps
// no more than a bounded amount of what it is given.
//
// Whoever knows the bounds of blocks feeds them one at a time, in any order:
//
//	g := content.NewGrouper(content.Options{})
//	for each block { g.Add(stackID, address, usableSize, bytes) } // bytes may be cut short; 64 KiB say enough
//	for _, group := range g.Groups() {
//		fmt.Println(group.Count, group.Shape, group.Samples) // 41210 JSON {uid, token, payload} [{"uid":99,...}]
//	}
//
// The key of Add (a stack, an arena, 0) keeps groups of the same shape apart. Groupers are for one goroutine each; Merge
// adds one to another.
//
// The trap: a block is what an allocator handed out, not what was asked for. Up to 24 bytes at its end, and all of a buffer
// that was never filled, are rests of earlier blocks. So shapes are read from a block's front, and what follows a complete
// value or a terminating zero is not judged. The other trap: whatever comes from here may be a secret. Samples and strings
// are redacted (letters become x, digits 9; keys, tags and punctuation stay) unless Options.NoRedact is set, and callers
// must never put block bytes into logs or errors.
package content
