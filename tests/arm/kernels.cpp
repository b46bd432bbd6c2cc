// Runs one call of a compiled kernel: the program that stands in for a library on another processor.
// `kernels.py` writes the call, its arguments and the memory they point to into a file, and reads the memory back.
#include <cstdio>
#include <cstdlib>

#include KERNEL  // a kernel.cpp

namespace {
std::FILE* file;

int64_t number() {
    int64_t value;
    if (std::fread(&value, sizeof value, 1, file) != 1) std::exit(2);
    return value;
}
// Memory at an address that has the same remainder by 64 as it had in the calling process.
char* memory(int64_t size, int64_t remainder) {
    char* begin = static_cast<char*>(std::aligned_alloc(64, round_up(size + 64, 64))) + remainder;
    if (size && std::fread(begin, 1, size, file) != static_cast<size_t>(size)) std::exit(2);
    return begin;
}
int64_t call(int64_t function, char* arguments, int64_t backward) {
#ifdef IS_MEMORY
    (void)function, (void)backward;
    memory_read(reinterpret_cast<Memory*>(arguments), nullptr);
#else
    Problem* problem = reinterpret_cast<Problem*>(arguments);
    if (function == 0) return sparse_attention_scratch_bytes(problem, backward);
    if (function == 1) sparse_attention_run(problem, backward);
    if (function == 2) sparse_attention_encode(reinterpret_cast<Encoding*>(arguments));
    if (function == 3) sparse_attention_select(problem, *reinterpret_cast<uint8_t**>(arguments + sizeof(Problem)));
#endif
    return 0;
}
}  // namespace

int main(int, char** argv) {
    file = std::fopen(argv[1], "r+b");
    const int64_t function = number(), backward = number(), size = number();
    char* arguments = memory(size, 0);
    const int64_t count = number();
    std::vector<char*> blocks(count);
    std::vector<int64_t> sizes(count);
    for (int64_t i = 0; i < count; i++) {
        sizes[i] = number();
        const int64_t remainder = number();
        blocks[i] = memory(sizes[i], remainder);
    }
    for (int64_t left = number(); left > 0; left--) {
        const int64_t at = number(), block = number(), offset = number();
        char* pointer = blocks[block] + offset;
        std::memcpy(arguments + at, &pointer, sizeof pointer);
    }
    const int64_t result = call(function, arguments, backward);
    std::rewind(file);
    std::fwrite(&result, sizeof result, 1, file);
    for (int64_t i = 0; i < count; i++) std::fwrite(blocks[i], 1, sizes[i], file);
    return std::fclose(file);
}
