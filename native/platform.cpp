#include "platform.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <new>
#include <vector>

namespace bedplate {
namespace {

constexpr std::size_t kKeptLines = 6;  // the first errors name the cause, later ones repeat it
thread_local std::vector<std::string> kept_lines;
std::mutex turns;

void keep_line(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
               const char* message, size_t length) {
    if (level == kFatal) std::fprintf(stderr, "executorch: %.*s\n", static_cast<int>(length), message);
    if (level == kError && kept_lines.size() < kKeptLines) kept_lines.emplace_back(message, length);
}

std::size_t whole_pages(std::size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

}  // namespace

void check(executorch::runtime::Error error, const std::string& doing) {
    if (error == executorch::runtime::Error::Ok) return;
    std::string code = executorch::runtime::to_string(error), text = doing + ": " + code;
    if (const auto scope = code.rfind("::"); scope != std::string::npos) code.erase(0, scope + 2);
    for (const std::string& line : kept_lines) text += "; " + line;
    throw NativeError(code, text);
}

// register_pal would print a complaint that a handler is there already, through that handler.
Turn::Turn() : lock_(turns), before_(executorch::runtime::get_pal_impl()->emit_log_message) {
    kept_lines.clear();
    const_cast<executorch::runtime::PalImpl*>(executorch::runtime::get_pal_impl())->emit_log_message =
        keep_line;
}

Turn::~Turn() {
    const_cast<executorch::runtime::PalImpl*>(executorch::runtime::get_pal_impl())->emit_log_message =
        before_;
}

std::size_t page_size() {
    static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

void trim_heap() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

Mapping::Mapping(std::size_t reserve) : reserved_(whole_pages(reserve)) {
    if (reserved_ == 0) return;
    void* at = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::uint8_t*>(at);
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(data_, reserved_);
}

void Mapping::grow(std::size_t bytes) {
    if (bytes <= size_) return;
    if (bytes > reserved_ || mprotect(data_, whole_pages(bytes), PROT_READ | PROT_WRITE) != 0)
        throw std::bad_alloc();
    size_ = bytes;
}

void Mapping::release() {
    if (size_ > 0) madvise(data_, whole_pages(size_), MADV_DONTNEED);
}

std::size_t Mapping::resident() const {
    if (size_ == 0) return 0;
    std::vector<unsigned char> pages(whole_pages(size_) / page_size());
    if (mincore(data_, whole_pages(size_), pages.data()) != 0) return 0;
    std::size_t count = 0;
    for (const unsigned char page : pages) count += page & 1;
    return count * page_size();
}

}  // namespace bedplate
