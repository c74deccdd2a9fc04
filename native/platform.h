// What the process gives to ExecuTorch: a place for its log lines, memory that costs only what is touched.
#pragma once

#include <executorch/runtime/core/error.h>
#include <executorch/runtime/platform/platform.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace bedplate {

// A failure of ExecuTorch: the name of its error code, and what it logged meanwhile.
class NativeError : public std::runtime_error {
  public:
    NativeError(std::string code, const std::string& what)
        : std::runtime_error(what), code_(std::move(code)) {}
    const std::string& code() const { return code_; }

  private:
    std::string code_;
};

// Throws NativeError("`doing`: <logged lines>") unless `error` is Ok.
void check(executorch::runtime::Error error, const std::string& doing);

// Held by whatever loads, computes or frees: one at a time in the process, for the thread pool and XNNPACK's
// workspace belong to the process.
//
// Meanwhile ExecuTorch's errors are kept for `check` to quote, and nothing is printed. The log handler before
// is put back at the end: it may be that of ExecuTorch's own Python bindings.
class Turn {
  public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

  private:
    std::lock_guard<std::mutex> lock_;
    pal_emit_log_message_method before_;
};

std::size_t page_size();

// Gives back to the system what loading or freeing a program left unused on the heap.
void trim_heap();

// Anonymous memory, zero until written; pages cost nothing until touched. Its address never changes.
class Mapping {
  public:
    // Reserves addresses only; `grow` makes a first part of them usable. Throws std::bad_alloc.
    explicit Mapping(std::size_t reserve);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    void grow(std::size_t bytes);  // to at least `bytes`; throws std::bad_alloc
    void release();                // gives all pages back; they read as zero again
    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::size_t resident() const;  // bytes in touched pages

  private:
    std::uint8_t* data_ = nullptr;
    std::size_t reserved_ = 0, size_ = 0;
};

}  // namespace bedplate
