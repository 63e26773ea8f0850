// destination_j[i] = op(source_0[i], ..., source_{n-1}[i]) for up to 8 sources and up to 8 destinations in one pass.
//
// Sources are combined from left to right. A destination may be one of the sources; otherwise operands do not overlap.
// Every byte is read once and written once, so the kernel is as fast as the memory: 16 bytes per access where the operands
// allow it, and several loads under way before the first is used. No shared memory, no barriers.
#include "element.cuh"
#include "operators.cuh"

constexpr int kMaxOperands = 8;
constexpr int kThreads = 256;
constexpr int kPackBytes = 16;
// Packs that a thread loads before it computes; bounds its registers.
constexpr int kPacksInFlight = 8;

// By value, so that a launch needs no copy. dsml_gpu/reduction/kernels.py fills it in and knows its layout.
struct ReduceArguments {
    const void* sources[kMaxOperands];
    void* destinations[kMaxOperands];
    long long count;         // elements of each operand
    long long head;          // elements before the first address that is a multiple of 16 in all operands; `count` if none is
    unsigned int source_count;
    unsigned int destination_count;
    unsigned int divisor;    // of an average
    unsigned int unaligned;  // an operand does not start at a multiple of the element's size
    unsigned long long weight;  // of `Weigh`; see `Scaling`
};

// 16 bytes of elements.
template <class T>
union Pack {
    uint4 all;
    T elements[kPackBytes / sizeof(T)];
};

template <class T>
__device__ __forceinline__ T load(const void* operand, long long index, bool unaligned) {
    if (!unaligned) return static_cast<const T*>(operand)[index];
    const unsigned char* bytes = static_cast<const unsigned char*>(operand) + index * static_cast<long long>(sizeof(T));
    union { unsigned char bytes[sizeof(T)]; T element; } value;
#pragma unroll
    for (unsigned int i = 0; i < sizeof(T); ++i) value.bytes[i] = bytes[i];
    return value.element;
}

template <class T>
__device__ __forceinline__ void store(void* operand, long long index, bool unaligned, T element) {
    if (!unaligned) {
        static_cast<T*>(operand)[index] = element;
        return;
    }
    unsigned char* bytes = static_cast<unsigned char*>(operand) + index * static_cast<long long>(sizeof(T));
    union { T element; unsigned char bytes[sizeof(T)]; } value = {element};
#pragma unroll
    for (unsigned int i = 0; i < sizeof(T); ++i) bytes[i] = value.bytes[i];
}

// The elements of one place in all sources, made into one.
template <class T, class Op, unsigned int kMaxSources>
__device__ __forceinline__ T combined(const T (&sources)[kMaxSources], unsigned int count, const Scaling& scaling) {
    typename Element<T>::Accumulator value = Element<T>::widened(sources[0]);
#pragma unroll
    for (unsigned int k = 1; k < kMaxSources; ++k) {
        if (k < count) value = Op::combine(value, Element<T>::widened(sources[k]));
    }
    return Op::template finish<T>(value, scaling);
}

template <class T, class Op, unsigned int kMaxSources>
__device__ __forceinline__ Pack<T> combined(const Pack<T> (&sources)[kMaxSources], unsigned int count, const Scaling& scaling) {
    Pack<T> result;
#pragma unroll
    for (unsigned int i = 0; i < kPackBytes / sizeof(T); ++i) {
        T elements[kMaxSources];
#pragma unroll
        for (unsigned int k = 0; k < kMaxSources; ++k) elements[k] = sources[k].elements[i];
        result.elements[i] = combined<T, Op, kMaxSources>(elements, count, scaling);
    }
    return result;
}

// Launched with a one-dimensional grid of any size and blocks of kThreads.
//
// kMaxSources is a power of two that holds source_count; the less it is, the more packs of each source are in flight.
// With 1 and an operator that does not scale, elements are copied bit by bit.
template <class T, class Op, unsigned int kMaxSources>
__global__ void __launch_bounds__(kThreads) reduce(const ReduceArguments arguments) {
    constexpr long long kPerPack = kPackBytes / sizeof(T);
    constexpr unsigned int kUnrolled = kPacksInFlight / kMaxSources;
    const bool copies = kMaxSources == 1 && !Op::kScales;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const unsigned int source_count = arguments.source_count;
    const unsigned int destination_count = arguments.destination_count;
    const Scaling scaling = {arguments.divisor, arguments.weight};
    const long long count = arguments.count;
    const long long head = arguments.head;
    const long long packs = (count - head) / kPerPack;

    for (long long first = thread; first < packs; first += threads * kUnrolled) {
        Pack<T> sources[kUnrolled][kMaxSources];
#pragma unroll
        for (unsigned int u = 0; u < kUnrolled; ++u) {
            const long long pack = first + u * threads;
            if (pack >= packs) break;
#pragma unroll
            for (unsigned int k = 0; k < kMaxSources; ++k) {
                if (k >= source_count) break;
                const T* start = static_cast<const T*>(arguments.sources[k]) + head;
                sources[u][k].all = reinterpret_cast<const uint4*>(start)[pack];
            }
        }
#pragma unroll
        for (unsigned int u = 0; u < kUnrolled; ++u) {
            const long long pack = first + u * threads;
            if (pack >= packs) break;
            const Pack<T> result = copies ? sources[u][0] : combined<T, Op, kMaxSources>(sources[u], source_count, scaling);
#pragma unroll
            for (unsigned int j = 0; j < kMaxOperands; ++j) {
                if (j >= destination_count) break;
                T* start = static_cast<T*>(arguments.destinations[j]) + head;
                reinterpret_cast<uint4*>(start)[pack] = result.all;
            }
        }
    }

    // What lies before the first pack and behind the last: all elements where the operands are not aligned alike.
    const bool unaligned = arguments.unaligned != 0;
    const long long packed = packs * kPerPack;
    for (long long i = thread; i < count - packed; i += threads) {
        const long long index = i < head ? i : i + packed;
        T sources[kMaxSources];
#pragma unroll
        for (unsigned int k = 0; k < kMaxSources; ++k) {
            if (k < source_count) sources[k] = load<T>(arguments.sources[k], index, unaligned);
        }
        const T result = copies ? sources[0] : combined<T, Op, kMaxSources>(sources, source_count, scaling);
#pragma unroll
        for (unsigned int j = 0; j < kMaxOperands; ++j) {
            if (j < destination_count) store<T>(arguments.destinations[j], index, unaligned, result);
        }
    }
}
