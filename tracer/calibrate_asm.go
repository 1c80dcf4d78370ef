package tracer

// The functions are in calibrate_amd64.s and calibrate_arm64.s. The addresses stand apart, as a Go function value of
// assembly code leads to a wrapper instead.
var emulatedAddress, steppedAddress uintptr

func emulated()
func stepped()
