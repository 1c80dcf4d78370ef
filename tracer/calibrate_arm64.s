#include "textflag.h"

// The functions that calibration probes; see the file for amd64. On arm64 the kernel simulates branches and steps the rest.
TEXT ·emulated(SB), NOSPLIT|NOFRAME, $0-0
	B	1(PC)
	RET

TEXT ·stepped(SB), NOSPLIT|NOFRAME, $0-0
	MOVD	R0, R0
	RET

DATA ·emulatedAddress(SB)/8, $·emulated(SB)
GLOBL ·emulatedAddress(SB), NOPTR|RODATA, $8
DATA ·steppedAddress(SB)/8, $·stepped(SB)
GLOBL ·steppedAddress(SB), NOPTR|RODATA, $8
