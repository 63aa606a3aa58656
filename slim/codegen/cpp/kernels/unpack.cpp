// The way back from packed weights: what saving, exporting and looking at a compiled model read.
#include "dot.h"
#include "packed.h"

using namespace slim;

extern "C" void slim_unpack(i32 format, i64 m, i64 n, i64 group, const void* packed, void* q) {
    const Packed from(Matrix{(Format)format, packed, nullptr, m, n, group});
    for (i64 r = 0; r < m; r++) {
        const u8* numbers = from.numbers(r / PANEL) + r % PANEL * 4;
        for (i64 c = 0; c < n; c++) {
            if (format == (i32)Format::int8) {
                static_cast<i8*>(q)[r * n + c] = (i8)(numbers[c / 4 * LINE + c % 4] - INT8_BIAS);
                continue;
            }
            u8 byte = numbers[c / 8 * LINE + c % 4];
            u8 nibble = c % 8 < 4 ? byte & 15 : byte >> 4;
            u8& place = static_cast<u8*>(q)[r * ceil_div(n, 2) + c / 2];
            place = (u8)(c % 2 ? place | nibble << 4 : nibble);
        }
    }
}
