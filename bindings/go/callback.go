package alignedkv

// #include <alignedkv.h>
//
// void akvGoLog(uintptr_t user, int32_t level, char *text);
// int akvGoWrite(uintptr_t user, void *bytes, size_t n);
// int akvGoRead(uintptr_t user, void *bytes, size_t n);
//
// static void log_line(void *user, int32_t level, const char *text) { akvGoLog((uintptr_t)user, level, (char *)text); }
// static int write_bytes(void *user, const void *bytes, size_t n) { return akvGoWrite((uintptr_t)user, (void *)bytes, n); }
// static int read_bytes(void *user, void *bytes, size_t n) { return akvGoRead((uintptr_t)user, bytes, n); }
//
// static void *log_function(void) { return (void *)log_line; }
// static void *write_function(void) { return (void *)write_bytes; }
// static void *read_function(void) { return (void *)read_bytes; }
import "C"

import "unsafe"

// What C calls, and what these call in turn is in export.go: a file that exports to C must not define C functions.

func logFunction() unsafe.Pointer   { return C.log_function() }
func writeFunction() unsafe.Pointer { return C.write_function() }
func readFunction() unsafe.Pointer  { return C.read_function() }
