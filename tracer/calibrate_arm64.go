package tracer

// Addresses of the functions below; a Go function value of assembly code leads to a wrapper instead.
var emulatedAddress, steppedAddress uintptr

func emulated()
func stepped()
