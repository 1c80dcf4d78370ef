// Command vmrun runs a program on another kernel, and is what `go test -exec` takes:
//
//	go build -o /tmp/vmrun ./test/kernels/vmrun
//	/tmp/vmrun -kernel 6.1 /bin/busybox uname -r
//	CGO_ENABLED=0 go test -exec '/tmp/vmrun -kernel 5.10' ./tracer/target/
//
// The program, the libraries it needs and the working directory (for testdata) are packed; -file adds more. The exit
// status is the program's, 125 when the machine did not run it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/allocsnoop/allocsnoop/test/kernels"
)

func main() { os.Exit(run()) }

type options struct {
	kernel  string
	timeout time.Duration
	console bool
	files   []string
	job     kernels.Job
}

func run() int {
	var o options
	flag.StringVar(&o.kernel, "kernel", "6.1", "series of the matrix")
	flag.DurationVar(&o.timeout, "timeout", 10*time.Minute, "give up after this time")
	flag.BoolVar(&o.console, "console", false, "print the kernel's log to stderr")
	flag.IntVar(&o.job.MemoryMB, "memory", 0, "memory of the machine in MiB (default 2048)")
	flag.BoolVar(&o.job.CgroupV1, "cgroup-v1", false, "mount the v1 memory controller, not v2")
	flag.Func("file", "pack a host file or tree: INSIDE=HOST, or one path for both (repeatable)", func(s string) error {
		o.files = append(o.files, s)
		return nil
	})
	flag.Func("module", "load this module first (repeatable)", func(s string) error {
		o.job.Modules = append(o.job.Modules, s)
		return nil
	})
	flag.Func("env", "set NAME=VALUE inside (repeatable)", func(s string) error {
		o.job.Env = append(o.job.Env, s)
		return nil
	})
	flag.Parse()
	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "vmrun: say what to run: vmrun [flags] PROGRAM [ARG...]")
		return 2
	}
	result, err := boot(o, flag.Args())
	if result != nil {
		os.Stdout.Write(result.Output)
		if o.console {
			os.Stderr.Write(result.Console)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "vmrun: %v\n", err)
		return 125
	}
	return result.ExitCode
}

func boot(o options, command []string) (*kernels.Result, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	found, err := kernels.Find(o.kernel)
	if err != nil {
		return nil, err
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("-kernel names %d series, want one", len(found))
	}
	store, err := kernels.DefaultStore()
	if err != nil {
		return nil, err
	}
	kernel, err := store.Get(ctx, found[0])
	if err != nil {
		return nil, err
	}
	if o.job.Image, err = pack(command[0], o.files); err != nil {
		return nil, err
	}
	o.job.Command = append([]string{"/prog/" + filepath.Base(command[0])}, command[1:]...)
	if o.job.Dir, err = os.Getwd(); err != nil {
		return nil, err
	}
	return kernel.Run(ctx, o.job)
}

// pack holds the program, the current directory's testdata and the files asked for.
func pack(program string, files []string) (*kernels.Image, error) {
	image, err := kernels.NewImage()
	if err != nil {
		return nil, err
	}
	if err := image.AddBinary("/prog/"+filepath.Base(program), program); err != nil {
		return nil, err
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	image.Add(filepath.Join(wd, ".vmrun"), 0o644, nil) // makes the directory exist
	if _, err := os.Stat("testdata"); err == nil {
		files = append(files, filepath.Join(wd, "testdata"))
	}
	for _, f := range files {
		inside, host, ok := strings.Cut(f, "=")
		if !ok {
			host = inside
		}
		if err := add(image, inside, host); err != nil {
			return nil, err
		}
	}
	return image, nil
}

func add(image *kernels.Image, inside, host string) error {
	st, err := os.Stat(host)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return image.AddTree(inside, host)
	}
	return image.AddBinary(inside, host)
}
