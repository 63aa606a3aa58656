// The way back from packed weights: what saving, exporting and looking at a compiled model read.
#include "dot.h"
#include "packed.h"

namespace slim {
namespace {

// `from` are a row's numbers in its panel: of each line the four bytes that are the row's.

void unpack_int8(const u8* from, i64 n, u8* q) {
    for (i64 c = 0; c < n; c++) q[c] = (u8)(from[c / 4 * LINE + c % 4] - INT8_BIAS);
}

void unpack_nibbles(const u8* from, i64 n, u8* q) {
    for (i64 c = 0; c < n; c++) {
        u8 byte = from[c / 8 * LINE + c % 4], nibble = c % 8 < 4 ? byte & 15 : byte >> 4;
        q[c / 2] = (u8)(c % 2 ? q[c / 2] | nibble << 4 : nibble);
    }
}

void unpack_int3(const u8* from, i64 n, u8* q) {
    for (i64 c = 0, bits = 0; c < n; c++) {
        i64 step = c % 32 / 4;
        const u8* block = from + c / 32 * 3 * LINE + c % 4;
        i64 code = (block[step / 4 * LINE] >> step % 4 * 2 & 3) | (block[2 * LINE] >> step & 1) << 2;
        bits |= code << c % 8 * 3;
        if (c % 8 != 7) continue;
        for (int b = 0; b < 3; b++) *q++ = (u8)(bits >> 8 * b);
        bits = 0;
    }
}

}  // namespace
}  // namespace slim

using namespace slim;

extern "C" void slim_unpack(i32 f, i64 m, i64 n, i64 group, const void* packed, void* q) {
    Format format = (Format)f;
    const Packed from(Matrix{format, packed, nullptr, m, n, group});
    u8* to = static_cast<u8*>(q);
    for (i64 r = 0; r < m; r++) {
        const u8* numbers = from.numbers(r / PANEL) + r % PANEL * 4;
        if (format == Format::int8) unpack_int8(numbers, n, to + r * n);
        else if (format == Format::int3) unpack_int3(numbers, n, to + r * (n / 8 * 3));
        else unpack_nibbles(numbers, n, to + r * ceil_div(n, 2));
    }
}
