package unwindtest

import "testing"

func TestPythonStacksEqualTheOracles(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, "/usr/bin/python3", "testdata/work.py")
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	w.oracle(t, 40, 97, s)
	w.complete(t, s)
}
