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

// Float32 [rows, columns] in the order of the program's last two output dimensions.
struct Logits {
    std::unique_ptr<float[]> data;
    std::size_t rows, columns;
};

using Constant = std::variant<bool, std::int64_t, double>;

class Method;

class Program {
  public:
    // Throws NativeError if a file cannot be opened or is not what it should be, or two hold one key.
    Program(const std::string& path, const std::vector<std::string>& data_files,
            std::shared_ptr<Activations> activations, bool weight_cache);
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
    bool weight_cache_;
    std::shared_ptr<Activations> activations_;
    std::vector<executorch::runtime::Kernel> kernels_;
    // In the order of their dependence: what comes later points into what comes before.
    std::unique_ptr<DataFiles> data_;  // null without data files: a program that holds its constants itself
    std::unique_ptr<MappedFile> file_;
    std::unique_ptr<executorch::runtime::Program> program_;
    std::map<std::string, std::unique_ptr<Method>> methods_;
};

}  // namespace bedplate
