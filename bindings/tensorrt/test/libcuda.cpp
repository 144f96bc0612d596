// The stand-in for libcuda with what the plugin needs beside the library: functions of the host in a stream's order.
#include "../../../kernels/host/libcuda.cpp"

API cuLaunchHostFunc(void *stream, void (*function)(void *), void *user) {
    READY;
    return submit(stream_of(stream), [=] { return function(user), OK; });
}
