package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
)

// grpcClient makes the few unary calls that container runtimes are asked with: POST over HTTP/2 without TLS, a message
// behind five bytes, the outcome in the trailers. A gRPC library would be larger than the rest of this tracer.
type grpcClient struct{ http http.Client }

// grpcError is a call's outcome other than OK.
type grpcError struct {
	code    int
	message string
}

func (e *grpcError) Error() string { return fmt.Sprintf("gRPC status %d: %s", e.code, safe(e.message)) }

// isUnimplemented says that the server does not know the service.
func isUnimplemented(err error) bool {
	const unimplemented = 12
	var e *grpcError
	return errors.As(err, &e) && e.code == unimplemented
}

func newGRPC(dial func(ctx context.Context, network, address string) (net.Conn, error)) *grpcClient {
	transport := &http.Transport{DialContext: dial, Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	return &grpcClient{http.Client{Transport: transport, Timeout: askTimeout}}
}

func (c *grpcClient) close() { c.http.CloseIdleConnections() }

// call returns the answer's message. method is "package.Service/Method".
func (c *grpcClient) call(ctx context.Context, method string, message []byte, header map[string]string) ([]byte, error) {
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/"+method, bytes.NewReader(append(body, message...)))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	for key, value := range header {
		request.Header.Set(key, value)
	}
	answer, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("call %s: %s", method, answer.Status)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", method, err)
	}
	if err := grpcStatus(answer); err != nil {
		return nil, fmt.Errorf("call %s: %w", method, err)
	}
	out, err := grpcMessage(text)
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", method, err)
	}
	return out, nil
}

// grpcStatus reads the outcome, which an answer without a message has among its headers.
func grpcStatus(answer *http.Response) error {
	headers := answer.Trailer
	if headers.Get("Grpc-Status") == "" {
		headers = answer.Header
	}
	code, err := strconv.Atoi(headers.Get("Grpc-Status"))
	if err != nil {
		return errors.New("the answer has no gRPC status")
	}
	if code != 0 {
		return &grpcError{code, headers.Get("Grpc-Message")}
	}
	return nil
}

// grpcMessage takes the one message out of its frame.
func grpcMessage(text []byte) ([]byte, error) {
	const head = 5
	if len(text) > maxAnswer {
		return nil, fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
	}
	if len(text) < head || text[0] != 0 || uint64(binary.BigEndian.Uint32(text[1:])) != uint64(len(text)-head) {
		return nil, errors.New("the answer is not one plain message")
	}
	return text[head:], nil
}

// field is one field of a protobuf message: bytes of a string, of bytes or of a message within, or a number.
type field struct {
	number int
	bytes  []byte
	value  uint64
}

var errProtobuf = errors.New("damaged protobuf message")

// nextField splits a message's first field off.
func nextField(message []byte) (field, []byte, error) {
	const varint, fixed64, delimited, fixed32 = 0, 1, 2, 5
	tag, n := binary.Uvarint(message)
	if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29-1 {
		return field{}, nil, errProtobuf
	}
	f, rest := field{number: int(tag >> 3)}, message[n:]
	size := uint64(0)
	switch tag & 7 {
	case varint:
		if f.value, n = binary.Uvarint(rest); n <= 0 {
			return field{}, nil, errProtobuf
		}
		return f, rest[n:], nil
	case fixed64:
		size = 8
	case fixed32:
		size = 4
	case delimited:
		if size, n = binary.Uvarint(rest); n <= 0 {
			return field{}, nil, errProtobuf
		}
		rest = rest[n:]
	default:
		return field{}, nil, errProtobuf
	}
	if size > uint64(len(rest)) {
		return field{}, nil, errProtobuf
	}
	f.bytes = rest[:size]
	return f, rest[size:], nil
}

// eachField calls take for the fields of a message, in order.
func eachField(message []byte, take func(field) error) error {
	for len(message) > 0 {
		f, rest, err := nextField(message)
		if err != nil {
			return err
		}
		if err := take(f); err != nil {
			return err
		}
		message = rest
	}
	return nil
}

// mapEntry reads an entry of a map of strings.
func mapEntry(message []byte) (key, value string, err error) {
	err = eachField(message, func(f field) error {
		switch f.number {
		case 1:
			key = string(f.bytes)
		case 2:
			value = string(f.bytes)
		}
		return nil
	})
	return key, value, err
}
