// A loaded program: a .pte, the data files whose constants it names, and its methods.
#pragma once

#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "data_files.h"
#include "logits.h"
#include "platform.h"

namespace bedplate {

// The activations of every program of an engine: steps take turns, so one buffer serves them all.
struct Activations {
    // Addresses only, and never moved, for the loaded methods point into it; far beyond what a program plans.
    Activations() : memory(std::size_t{64} << 30) {}
    Mapping memory;
};

// The keys and values of one conversation.
struct KvCache {
    explicit KvCache(std::size_t bytes) : memory(bytes) { memory.grow(bytes); }
    Mapping memory;
};

using Constant = std::variant<bool, std::int64_t, double>;

// How XNNPACK keeps the weights that it has packed. shared: once for all programs of the process that name
// them, or for each. file: keeps the shared ones; it is mapped, or written if it is not there; empty: none.
struct PackedWeights {
    bool shared;
    std::string file;
};

class Method;

class Program {
  public:
    // Throws NativeError if a file cannot be opened or is not what it should be, or two hold one key.
    Program(const std::string& path, const std::vector<std::string>& data_files,
            std::shared_ptr<Activations> activations, PackedWeights packed_weights);
    ~Program();

    std::vector<std::string> method_names() const;
    // The values of the methods without inputs, which ExecuTorch's LLM runners read.
    std::map<std::string, std::vector<Constant>> constants() const;

    // Resolves every constant and packs weights; does nothing if loaded. Throws NativeError.
    void load(const std::string& method);
    // Bytes of KV cache that a conversation with this program takes.
    std::size_t kv_bytes(const std::string& method);
    // Runs tokens at positions pos … pos + count - 1. Not for two threads at once: hold a Turn.
    Logits step(const std::string& method, const std::int64_t* tokens, std::size_t count, std::int64_t pos,
                KvCache& kv);

  private:
    Method& loaded(const std::string& method);
    std::unique_ptr<Method> open(const std::string& method) const;

    std::string path_;
    PackedWeights packed_weights_;
    std::shared_ptr<Activations> activations_;
    std::vector<executorch::runtime::Kernel> kernels_;
    // In the order of their dependence: what comes later points into what comes before.
    std::unique_ptr<DataFiles> data_;  // null without data files: a program that holds its constants itself
    std::unique_ptr<MappedFile> file_;
    std::unique_ptr<executorch::runtime::Program> program_;
    std::map<std::string, std::unique_ptr<Method>> methods_;
};

}  // namespace bedplate
