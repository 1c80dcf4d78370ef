#include "textflag.h"

// The functions that calibration probes. They are never inlined and keep no Go frame, so that a return probe may
// exchange their return address.

// emulated begins with an instruction that the kernel emulates.
TEXT ·emulated(SB), NOSPLIT|NOFRAME, $0-0
	PUSHQ AX
	POPQ AX
	RET

// stepped begins with one that the kernel single-steps.
TEXT ·stepped(SB), NOSPLIT|NOFRAME, $0-0
	TESTQ AX, AX
	RET

DATA ·emulatedAddress(SB)/8, $·emulated(SB)
GLOBL ·emulatedAddress(SB), NOPTR|RODATA, $8
DATA ·steppedAddress(SB)/8, $·stepped(SB)
GLOBL ·steppedAddress(SB), NOPTR|RODATA, $8
