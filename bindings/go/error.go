package alignedkv

// #include <stdlib.h>
import "C"

import (
	"fmt"
	"unsafe"
)

// Status is what went wrong, as an error to compare with: errors.Is(err, ErrBusy).
type Status int32

// Error is the name of the status in C: "AKV_E_BUSY".
func (s Status) Error() string { return callStatusString(int32(s)) }

// Error is a failed call. It unwraps to its Status.
type Error struct {
	Status Status
	Call   string // The C function.
	Text   string // Argument, value, what was expected.
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s: %s", e.Call, e.Status.Error(), e.Text) }

// Unwrap gives the Status.
func (e *Error) Unwrap() error { return e.Status }

// failure takes the text, which the call that failed brought along.
func failure(call string, status int32, text unsafe.Pointer) error {
	e := &Error{Status: Status(status), Call: call, Text: "no memory for the text"}
	if text != nil {
		e.Text = C.GoString((*C.char)(text))
		C.free(text)
	}
	return e
}

func argument(call, format string, a ...any) error {
	return &Error{Status: ErrArgument, Call: call, Text: fmt.Sprintf(format, a...)}
}

func closed(call, what string) error {
	return &Error{Status: ErrHandle, Call: call, Text: what + " is closed"}
}

// Version is name, version, commit and what is built in, of the library that is loaded.
func Version() string { return callVersionString() }
