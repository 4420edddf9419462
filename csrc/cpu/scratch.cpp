// Scratch that stays with its thread: a fresh allocation would be mapped and zeroed page by page.
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace fastood {
namespace {

struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

float* scratch(int slot, int64_t n) {
    thread_local Buffer buffers[8];
    Buffer& buffer = buffers[slot];
    if (buffer.size < n) {
        std::free(buffer.data);
        buffer.size = round_up(n, 1024);
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, static_cast<size_t>(buffer.size) * sizeof(float)) != 0) {
            buffer.data = nullptr;
            buffer.size = 0;
            throw std::bad_alloc();
        }
        buffer.data = static_cast<float*>(fresh);
    }
    return buffer.data;
}

}  // namespace fastood
