package alignedkv

// #include <stddef.h>
// #include <stdint.h>
import "C"

import (
	"fmt"
	"io"
	"runtime/cgo"
	"unsafe"
)

//export akvGoLog
func akvGoLog(user C.uintptr_t, level C.int32_t, text *C.char) {
	defer func() { _ = recover() }() // A panic must not unwind C.
	cgo.Handle(user).Value().(func(LogLevel, string))(LogLevel(level), C.GoString(text))
}

//export akvGoWrite
func akvGoWrite(user C.uintptr_t, bytes unsafe.Pointer, n C.size_t) C.int {
	s := cgo.Handle(user).Value().(*stream)
	return s.transfer(bytes, n, func(b []byte) error {
		_, err := s.writer.Write(b)
		return err
	})
}

//export akvGoRead
func akvGoRead(user C.uintptr_t, bytes unsafe.Pointer, n C.size_t) C.int {
	s := cgo.Handle(user).Value().(*stream)
	return s.transfer(bytes, n, func(b []byte) error {
		_, err := io.ReadFull(s.reader, b)
		return err
	})
}

// transfer keeps the error that ends a stream, which is the caller's own and says more than the library's.
func (s *stream) transfer(bytes unsafe.Pointer, n C.size_t, move func([]byte) error) (stop C.int) {
	defer func() {
		if p := recover(); p != nil { // A panic must not unwind C.
			s.err, stop = fmt.Errorf("panic: %v", p), 1
		}
	}()
	if s.err = move(unsafe.Slice((*byte)(bytes), int(n))); s.err != nil {
		return 1
	}
	return 0
}
