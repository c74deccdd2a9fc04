// Constants as they lie in files.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "memory.h"

namespace bedplate {

// A range of an open file. It is read, not mapped: if a mapped file is cut short, the process ends.
struct Source {
    int file;
    std::int64_t offset, size;

    // Reads `count` bytes from byte `at` of the range on, which it must have. InvalidError: the file ends
    // before, or cannot be read.
    void read(std::int64_t at, std::int64_t count, void* to) const {
        auto* out = static_cast<std::uint8_t*>(to);
        while (count > 0) {
            const ssize_t got = pread(file, out, static_cast<std::size_t>(count), offset + at);
            if (got < 0 && errno == EINTR) continue;
            require(got > 0, "the file ends too early, or cannot be read");
            out += got;
            at += got;
            count -= got;
        }
    }
};

}  // namespace bedplate
