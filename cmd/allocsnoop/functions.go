package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/tracer/allocator"
)

// ownFunctions are the flags that declare functions beyond the known allocators.
type ownFunctions struct {
	alloc, free, files []string
}

func (o *ownFunctions) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&o.alloc, "alloc", nil, "own function that hands out blocks, as `LIB:FUNC(size=1)`: also count=N, ptr=N, out=ret|N, pool=ret|N, kind=NAME")
	f.StringArrayVar(&o.free, "free", nil, "own function that takes them back, as `LIB:FUNC(ptr=1)`, or ends a pool: pool=N; also kind=NAME")
	f.StringArrayVar(&o.files, "functions", nil,
		"`FILE` of such definitions, one a line behind alloc or free, or a built-in set: "+strings.Join(allocator.Shipped(), ", "))
}

// definitions reads all flags and checks that they make pairs.
func (o *ownFunctions) definitions() ([]allocator.Definition, error) {
	var definitions []allocator.Definition
	for _, text := range o.alloc {
		d, err := allocator.ParseAlloc(text)
		if err != nil {
			return nil, fmt.Errorf("--alloc %w", err)
		}
		definitions = append(definitions, d)
	}
	for _, text := range o.free {
		d, err := allocator.ParseFree(text)
		if err != nil {
			return nil, fmt.Errorf("--free %w", err)
		}
		definitions = append(definitions, d)
	}
	for _, name := range o.files {
		more, err := functionsFile(name)
		if err != nil {
			return nil, fmt.Errorf("--functions %w", err)
		}
		definitions = append(definitions, more...)
	}
	return definitions, allocator.CheckPairs(definitions)
}

// functionsFile reads a built-in set by its bare name, anything else as a file.
func functionsFile(name string) ([]allocator.Definition, error) {
	if slices.Contains(allocator.Shipped(), name) {
		return allocator.ShippedDefinitions(name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%w (built-in sets: %s)", err, strings.Join(allocator.Shipped(), ", "))
	}
	defer f.Close()
	return allocator.ParseFunctions(name, f)
}
