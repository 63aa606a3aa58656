// Writes int8 and int4 weights in the order in which the kernels read them.
#include "dot.h"
#include "packed.h"

namespace slim {
namespace {

// Half precision must hold every scale exactly: otherwise compiling would change the model.
ScaleFormat scale_format(const float* scale, i64 count) {
    if (!scale) return ScaleFormat::none;
    for (i64 i = 0; i < count; i++)
        if ((float)(f16)scale[i] != scale[i]) return ScaleFormat::f32;
    return ScaleFormat::f16;
}

PackedLayout layout_of(i32 format, i64 m, i64 n, i64 group, const float* scale, ScaleFormat* scales) {
    *scales = group ? scale_format(scale, m * (n / group)) : ScaleFormat::none;
    return PackedLayout((Format)format, m, n, group, *scales);
}

void pack_scales(const PackedLayout& layout, ScaleFormat format, const float* scale, i64 first_row, i64 rows, u8* to) {
    for (i64 g = 0; g < layout.groups; g++) {
        for (i64 r = 0; r < rows; r++) {
            float value = scale[(first_row + r) * layout.groups + g];
            f16 half = (f16)value;
            u8* place = to + (g * PANEL + r) * layout.scale_size;
            if (format == ScaleFormat::f16) std::memcpy(place, &half, sizeof half);
            else std::memcpy(place, &value, sizeof value);
        }
    }
}

void pack_int8(const i8* q, i64 n, i64 rows, u8* to) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < n; c++) to[c / 4 * LINE + r * 4 + c % 4] = (u8)(q[r * n + c] + INT8_BIAS);
}

void pack_int4(const u8* q, i64 n, i64 rows, u8* to) {
    for (i64 r = 0; r < rows; r++) {
        for (i64 c = 0; c < n; c++) {
            i64 index = r * ceil_div(n, 2) + c / 2;
            u8 nibble = c % 2 ? q[index] >> 4 : q[index] & 15;
            to[c / 8 * LINE + r * 4 + c % 4] |= (u8)(c % 8 < 4 ? nibble : nibble << 4);
        }
    }
}

}  // namespace
}  // namespace slim

using namespace slim;

i64 slim_packed_bytes(i32 format, i64 m, i64 n, i64 group, const float* scale) {
    bool quantized = format == (i32)Format::int8 || format == (i32)Format::int4;
    if (!quantized || m <= 0 || n <= 0 || group < 0) return 0;
    if (group && (group % GROUP_STEP || n % group || !scale)) return 0;
    ScaleFormat scales;
    PackedLayout layout = layout_of(format, m, n, group, scale, &scales);
    return (i64)sizeof(PackedHeader) + layout.panels * layout.panel_bytes;
}

void slim_pack(i32 format, i64 m, i64 n, i64 group, const void* q, const float* scale, void* packed) {
    PackedHeader header{};
    PackedLayout layout = layout_of(format, m, n, group, scale, &header.scales);
    std::memcpy(packed, &header, sizeof header);
    u8* panel = static_cast<u8*>(packed) + sizeof header;
    for (i64 first = 0; first < m; first += PANEL, panel += layout.panel_bytes) {
        i64 rows = m - first < PANEL ? m - first : PANEL;
        std::memset(panel, 0, layout.panel_bytes);
        pack_scales(layout, header.scales, scale, first, rows, panel);
        u8* numbers = panel + layout.data_offset;
        if (format == (i32)Format::int8) pack_int8(static_cast<const i8*>(q) + first * n, n, rows, numbers);
        else pack_int4(static_cast<const u8*>(q) + first * ceil_div(n, 2), n, rows, numbers);
    }
}
