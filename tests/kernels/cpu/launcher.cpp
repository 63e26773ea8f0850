// Launches the kernels that are linked with it.
//
// `launcher layout` prints `struct ReduceArguments` and the constants that Python repeats. `launcher run` reads launches
// from standard input until it ends, and writes after each the bytes of its buffers to standard output.
#include "launcher.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

// Before each launch; then as many sizes (uint64) as there are buffers, then the bytes of the buffers.
struct Header {
    char kernel[64];
    ReduceArguments arguments;  // addresses are (1 + number of the buffer) << 32 | offset; 0 where there is no operand
    std::uint32_t blocks;
    std::uint32_t threads;  // of each block
    std::uint32_t backwards;  // run the last thread first
    std::uint32_t buffers;
};

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "launcher: %s\n", message.c_str());
    std::exit(2);
}

// False where the input has ended.
bool read(void* to, std::size_t size) {
    const std::size_t got = std::fread(to, 1, size, stdin);
    if (got != 0 && got != size) fail("the input ends within a launch");
    return got == size;
}

void run() {
    for (Header header; read(&header, sizeof header);) {
        std::vector<std::uint64_t> sizes(header.buffers);
        if (!sizes.empty() && !read(sizes.data(), sizes.size() * sizeof sizes[0])) fail("a launch without its buffers");
        // An allocation each, which ends where the operand does: the address sanitizer then sees every byte too many.
        std::vector<unsigned char*> buffers;
        for (const std::uint64_t size : sizes) {
            void* buffer = nullptr;
            if (posix_memalign(&buffer, 64, size) != 0) fail("no memory");
            if (size != 0 && !read(buffer, size)) fail("a launch without its buffers");
            buffers.push_back(static_cast<unsigned char*>(buffer));
        }
        const auto located = [&](const void* address) -> void* {
            const auto number = reinterpret_cast<std::uintptr_t>(address);
            return number == 0 ? nullptr : buffers.at((number >> 32) - 1) + (number & 0xffffffffu);
        };
        for (const void*& source : header.arguments.sources) source = located(source);
        for (void*& destination : header.arguments.destinations) destination = located(destination);

        if (!launch(header.kernel, header.arguments, header.blocks, header.threads, header.backwards != 0)) {
            fail(std::string("no kernel ") + header.kernel);
        }

        for (std::size_t i = 0; i < sizes.size(); ++i) {
            std::fwrite(buffers[i], 1, sizes[i], stdout);
            std::free(buffers[i]);
        }
        std::fflush(stdout);  // where it ends early, what came out tells in which launch
    }
}

void print_layout() {
#define FIELD(name) \
    std::printf(#name " %zu %zu\n", offsetof(ReduceArguments, name), sizeof(ReduceArguments::name))
    FIELD(sources);
    FIELD(destinations);
    FIELD(count);
    FIELD(head);
    FIELD(source_count);
    FIELD(destination_count);
    FIELD(divisor);
    FIELD(unaligned);
    FIELD(weight);
#undef FIELD
    std::printf("ReduceArguments 0 %zu\n", sizeof(ReduceArguments));
    std::printf("kMaxOperands %d\nkThreads %d\nkPackBytes %d\nkPacksInFlight %d\n", kMaxOperands, kThreads, kPackBytes,
                kPacksInFlight);
}

// The conversions alone, in the shape of a kernel: one source, one destination.
template <class From, class To, To convert(From)>
void converted(const ReduceArguments arguments) {
    const auto* from = static_cast<const From*>(arguments.sources[0]);
    auto* to = static_cast<To*>(arguments.destinations[0]);
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    for (long long i = 0; i < arguments.count; ++i) to[i] = convert(from[i]);
}

const Registration conversions[] = {
    {"widen float16", converted<float16, float, widen>},
    {"widen bfloat16", converted<bfloat16, float, widen>},
    {"narrow float16", converted<float, float16, narrow_to_float16>},
    {"narrow bfloat16", converted<float, bfloat16, narrow_to_bfloat16>},
};

}  // namespace

int main(int argc, char** argv) {
    const std::string what = argc == 2 ? argv[1] : "";
    if (what == "layout") {
        print_layout();
    } else if (what == "run") {
        run();
    } else {
        fail("usage: launcher layout | run");
    }
}
