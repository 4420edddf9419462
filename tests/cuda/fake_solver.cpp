// A cuSOLVER that solves nothing: it notes what it is asked, and scales values and vectors so that
// the caller can tell. For ctypes and for dlopen.
#include <cstddef>
#include <cstdint>

namespace {
int32_t handles = 0, refuse = 0;
int64_t seen[8];
void* stream_seen = nullptr;
}  // namespace

extern "C" {

int32_t cusolverDnCreate(void** handle) {
    *handle = &handles;
    ++handles;
    return refuse;
}

int32_t cusolverDnCreateParams(void** params) {
    *params = &seen;
    return 0;
}

int32_t cusolverDnSetStream(void*, void* stream) {
    stream_seen = stream;
    return 0;
}

#ifndef WITHOUT_BATCHED
int32_t cusolverDnXsyevBatched_bufferSize(void*, void*, int32_t, int32_t, int64_t n, int32_t,
                                          const void*, int64_t, int32_t, const void*, int32_t,
                                          size_t* on_device, size_t* on_host, int64_t batch) {
    *on_device = static_cast<size_t>(n * batch);
    *on_host = 7;
    return refuse;
}

int32_t cusolverDnXsyevBatched(void* handle, void* params, int32_t jobz, int32_t uplo, int64_t n,
                               int32_t type_a, void* a, int64_t lda, int32_t type_w, void* w,
                               int32_t compute, void*, size_t device_bytes, void*,
                               size_t host_bytes, int* info, int64_t batch) {
    const int64_t all[8] = {jobz, uplo, n, lda, batch, type_a * 100 + type_w * 10 + compute,
                            static_cast<int64_t>(device_bytes), static_cast<int64_t>(host_bytes)};
    for (int i = 0; i < 8; ++i) seen[i] = all[i];
    if (handle != &handles || params != &seen) return 99;
    static_cast<double*>(a)[n * n * batch - 1] = 5;
    static_cast<double*>(w)[n * batch - 1] = 6;
    info[batch - 1] = 0;
    return refuse;
}
#endif

int32_t fake_handles() { return handles; }
void fake_refuse(int32_t status) { refuse = status; }
int64_t fake_seen(int32_t i) { return seen[i]; }
void* fake_stream() { return stream_seen; }
}
