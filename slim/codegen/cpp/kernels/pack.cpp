// Writes quantised weights in the order in which the kernels read them.
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

PackedLayout layout_of(Format format, i64 m, i64 n, i64 group, const float* scale, bool zeros, ScaleFormat* scales) {
    *scales = group ? scale_format(scale, m * (n / group)) : ScaleFormat::none;
    return PackedLayout(format, m, n, group, *scales, zeros);
}

void pack_scales(const PackedLayout& layout, ScaleFormat format, const float* scale, i64 first_row, i64 rows, u8* to) {
    for (i64 g = 0; g < layout.groups; g++) {
        for (i64 r = 0; r < rows; r++) {
            float value = scale[(first_row + r) * layout.groups + g];
            f16 half = (f16)value;
            u8* place = to + g * layout.group_bytes + r * layout.scale_size;
            if (format == ScaleFormat::f16) std::memcpy(place, &half, sizeof half);
            else std::memcpy(place, &value, sizeof value);
        }
    }
}

void pack_zeros(const PackedLayout& layout, const i8* zero, i64 rows, u8* to) {
    to += PANEL * layout.scale_size;
    for (i64 g = 0; g < layout.groups; g++)
        for (i64 r = 0; r < rows; r++) to[g * layout.group_bytes + r] = (u8)(ZERO_BIAS - zero[r * layout.groups + g]);
}

void pack_int8(const i8* q, i64 n, i64 rows, u8* to) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < n; c++) to[c / 4 * LINE + r * 4 + c % 4] = (u8)(q[r * n + c] + INT8_BIAS);
}

void pack_nibbles(const u8* q, i64 n, i64 rows, u8* to) {
    for (i64 r = 0; r < rows; r++) {
        for (i64 c = 0; c < n; c++) {
            i64 index = r * ceil_div(n, 2) + c / 2;
            u8 nibble = c % 2 ? q[index] >> 4 : q[index] & 15;
            to[c / 8 * LINE + r * 4 + c % 4] |= (u8)(c % 8 < 4 ? nibble : nibble << 4);
        }
    }
}

void pack_int3(const u8* q, i64 n, i64 rows, u8* to) {
    for (i64 r = 0; r < rows; r++) {
        for (i64 c = 0; c < n; c++) {
            const u8* three = q + (r * n + c) / 8 * 3;
            int bits = three[0] | three[1] << 8 | three[2] << 16, code = bits >> c % 8 * 3 & 7, step = (int)(c % 32 / 4);
            u8* block = to + c / 32 * 3 * LINE + r * 4 + c % 4;
            block[step / 4 * LINE] |= (u8)((code & 3) << step % 4 * 2);
            block[2 * LINE] |= (u8)(code >> 2 << step);
        }
    }
}

i64 row_bytes(Format format, i64 n) {
    if (format == Format::int8) return n;
    return format == Format::int3 ? n / 8 * 3 : ceil_div(n, 2);
}

}  // namespace
}  // namespace slim

using namespace slim;

i64 slim_packed_bytes(i32 f, i64 m, i64 n, i64 group, const float* scale, const i8* zero) {
    Format format = (Format)f;
    if (!is_packed(format) || m <= 0 || n <= 0 || group < 0) return 0;
    if (format == Format::int3 && n % 8) return 0;
    if (zero && (is_bytes(format) || !group)) return 0;
    if (group && (group % (format == Format::int3 ? INT3_STEP : GROUP_STEP) || n % group || !scale)) return 0;
    ScaleFormat scales;
    PackedLayout layout = layout_of(format, m, n, group, scale, zero, &scales);
    return (i64)sizeof(PackedHeader) + layout.panels * layout.panel_bytes;
}

void slim_pack(i32 f, i64 m, i64 n, i64 group, const void* q, const float* scale, const i8* zero, void* packed) {
    Format format = (Format)f;
    PackedHeader header{};
    PackedLayout layout = layout_of(format, m, n, group, scale, zero, &header.scales);
    header.zeros = zero != nullptr;
    std::memcpy(packed, &header, sizeof header);
    u8* panel = static_cast<u8*>(packed) + sizeof header;
    for (i64 first = 0; first < m; first += PANEL, panel += layout.panel_bytes) {
        i64 rows = m - first < PANEL ? m - first : PANEL;
        std::memset(panel, 0, layout.panel_bytes);
        pack_scales(layout, header.scales, scale, first, rows, panel);
        if (zero) pack_zeros(layout, zero + first * layout.groups, rows, panel);
        const u8* from = static_cast<const u8*>(q) + first * row_bytes(format, n);
        u8* numbers = panel + layout.data_offset;
        if (format == Format::int8) pack_int8(reinterpret_cast<const i8*>(from), n, rows, numbers);
        else if (format == Format::int3) pack_int3(from, n, rows, numbers);
        else pack_nibbles(from, n, rows, numbers);
    }
}
