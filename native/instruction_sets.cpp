#include "instruction_sets.h"

#include <atomic>

#include "memory.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bedplate {

#if defined(__x86_64__)
namespace avx512amx {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2vnni {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace dotprod {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

#if defined(__x86_64__)
// Linux gives a process the registers of AMX when it asks for them, once for all its threads. It may refuse:
// so do old kernels, and so does one that finds a stack for signals that is too small for these registers.
bool tiles_are_given() {
#if defined(__linux__)
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-int8")) return false;
    constexpr long kAskFor = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool given = syscall(SYS_arch_prctl, kAskFor, kTiles) == 0;
    return given;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && tiles_are_given()) found.push_back(&avx512amx::kernels);
    if (vnni) found.push_back(&avx512vnni::kernels);
    if (avx512) found.push_back(&avx512::kernels);
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2vnni::kernels);
    if (avx2) found.push_back(&avx2::kernels);
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&dotprod::kernels);
#endif
    found.push_back(&baseline::kernels);
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{available().front()};
    return kernels;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& current_kernels() { return *chosen(); }

void use_instruction_set(const std::string& name) {
    for (const Kernels* kernels : available())
        if (name == kernels->name) {
            chosen() = kernels;
            return;
        }
    throw InvalidError("this machine has no instruction set " + name);
}

}  // namespace bedplate
