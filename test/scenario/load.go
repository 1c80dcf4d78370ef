package scenario

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Load says what to request. Every request is made exactly once; one that fails is an error, never tried again.
type Load struct {
	Requests    int           // 0: as many as fit into Duration
	Duration    time.Duration // 0: until Requests are made
	Rate        int           // requests a second, as far as the service keeps up; 0: as fast as it answers
	Concurrency int           // connections, each with one request at a time; 1 when zero
	Path        string        // "/session" (the default) gets a uid; "/text" and others are requested as they are
	FirstUID    int           // uids count up from here
}

// Report is the outcome of a load.
type Report struct {
	Requests int           `json:"requests"`
	Errors   int           `json:"errors"`
	Bytes    int64         `json:"bytes"` // of response bodies, as transferred
	Elapsed  time.Duration `json:"elapsed"`
	P50      time.Duration `json:"p50"`
	P99      time.Duration `json:"p99"`
	// FirstError is one of the errors, for the message of a failing test.
	FirstError string `json:"first_error,omitempty"`
}

// PerSecond is the rate of requests.
func (r Report) PerSecond() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Requests) / r.Elapsed.Seconds()
}

// Load sends n session requests over so many connections.
func (s *Service) Load(ctx context.Context, n, concurrency int) (Report, error) {
	return s.Run(ctx, Load{Requests: n, Concurrency: concurrency})
}

// Run sends a load. The error is the first failing request's; the report then still tells how many failed.
func (s *Service) Run(ctx context.Context, load Load) (Report, error) {
	return run(ctx, s.addr(), s.roots, load)
}

func run(ctx context.Context, addr string, roots *x509.CertPool, load Load) (Report, error) {
	if load.Requests <= 0 && load.Duration <= 0 {
		return Report{}, errors.New("load: neither a number of requests nor a duration")
	}
	if load.Path == "" {
		load.Path = "/session"
	}
	end := time.Time{}
	if load.Duration > 0 {
		end = time.Now().Add(load.Duration)
	}
	var next atomic.Int64
	began := time.Now()
	take := func() (int, bool) {
		i := int(next.Add(1) - 1)
		if load.Rate > 0 {
			due := began.Add(time.Duration(i) * time.Second / time.Duration(load.Rate))
			select {
			case <-time.After(time.Until(due)):
			case <-ctx.Done():
			}
		}
		late := !end.IsZero() && time.Now().After(end)
		return i, (load.Requests <= 0 || i < load.Requests) && !late && ctx.Err() == nil
	}

	connections := make([]connection, max(load.Concurrency, 1))
	started := time.Now()
	var group sync.WaitGroup
	for i := range connections {
		group.Go(func() { connections[i].run(ctx, &client{addr: addr, roots: roots}, load, take) })
	}
	group.Wait()
	return summarize(connections, time.Since(started)), errors.Join(ctx.Err(), firstError(connections))
}

// connection is what one connection did.
type connection struct {
	latencies []time.Duration
	bytes     int64
	errors    int
	err       error
}

func (c *connection) run(ctx context.Context, client *client, load Load, take func() (int, bool)) {
	defer client.close()
	for i, ok := take(); ok; i, ok = take() {
		path := load.Path
		if path == "/session" {
			path = fmt.Sprintf("/session?uid=%d", load.FirstUID+i)
		}
		start := time.Now()
		body, err := client.get(ctx, path)
		if err != nil {
			c.errors++
			c.err = err
			client.close()
			continue
		}
		c.latencies = append(c.latencies, time.Since(start))
		c.bytes += int64(len(body))
	}
}

func firstError(connections []connection) error {
	for _, c := range connections {
		if c.err != nil {
			return c.err
		}
	}
	return nil
}

func summarize(connections []connection, elapsed time.Duration) Report {
	report := Report{Elapsed: elapsed}
	var all []time.Duration
	for _, c := range connections {
		all = append(all, c.latencies...)
		report.Errors += c.errors
		report.Bytes += c.bytes
	}
	report.Requests = len(all)
	if err := firstError(connections); err != nil {
		report.FirstError = err.Error()
	}
	slices.Sort(all)
	report.P50, report.P99 = percentile(all, 50), percentile(all, 99)
	return report
}

// percentile is the smallest of the sorted values that p percent of them do not exceed.
func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[(len(sorted)*p+99)/100-1]
}

// client is one keep-alive connection. net/http's client would cost more CPU than the service it measures.
type client struct {
	addr   string
	roots  *x509.CertPool
	conn   net.Conn
	reader *bufio.Reader
}

const requestTimeout = 30 * time.Second

func (c *client) get(ctx context.Context, path string) ([]byte, error) {
	if c.conn == nil {
		if err := c.dial(ctx); err != nil {
			return nil, err
		}
	}
	deadline := time.Now().Add(requestTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := c.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	request := "GET " + path + " HTTP/1.1\r\nHost: " + c.addr + "\r\nAccept-Encoding: gzip\r\n\r\n"
	if _, err := io.WriteString(c.conn, request); err != nil {
		return nil, fmt.Errorf("get %s: %w", path, err)
	}
	response, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", path, err)
	}
	body, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", path, err)
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: %s", path, response.Status)
	}
	if response.Close {
		c.close()
	}
	return body, nil
}

func (c *client) dial(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return err
	}
	if c.roots != nil {
		conn = tls.Client(conn, &tls.Config{RootCAs: c.roots, ServerName: "127.0.0.1"})
	}
	c.conn, c.reader = conn, bufio.NewReader(conn)
	return nil
}

func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}
