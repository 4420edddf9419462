// Image rows made ready to be multiplied by classes, on whichever unit multiplies.
//
// Scratch: 0 the rows, 1 one row, 6 their scales.
#pragma once

constexpr int64_t BLOCK = 8 * MR;  // rows whose similarities are in scratch at the same time

// Packed classes, in one of two layouts.
struct Classes {
    const float* panels;
    const uint16_t* split;  // for the matrix unit, or null
};

struct LeftRows {
    Packed packed;
#if FASTOOD_AMX
    SplitRows split;
    const float* scales;  // of each row of products, or null
#endif
};

// Rows that are multiplied together; work is cut into multiples of it.
static inline int64_t unit_of_rows(bool split) {
#if FASTOOD_AMX
    if (split) return SQUARE;
#endif
    (void)split;
    return MR;
}

// How many of `rows` to take at a time, about BLOCK. Each block reads all classes: rather one larger
// block than a sliver at the end.
static inline int64_t rows_of_a_block(int64_t rows, int64_t unit) {
    const int64_t blocks = (rows + BLOCK / 2) / BLOCK;
    return round_up((rows + blocks) / (blocks > 1 ? blocks : 1), unit);
}

// Rows first..first+rows of `image`, checked and normalised if asked.
static LeftRows left_rows(const Rows& image, bool normalize, bool split, int64_t first,
                          int64_t rows, uint8_t* faults) {
    LeftRows left{};
    left.packed.rows = rows;
#if FASTOOD_AMX
    if (split) {
        const int64_t numbers = round_up(rows, SQUARE) * round_up(image.width, SLICE) * PARTS;
        float* scales = scratch(6, rows);
        left.split = split_rows(image, first, rows, normalize,
                                reinterpret_cast<uint16_t*>(scratch(0, numbers / 2)), scales,
                                faults);
        left.scales = left.split.parts == 1 ? scales : nullptr;
        return left;
    }
#endif
    (void)split;
    const int64_t inner = round_up(image.width, CHUNK);
    left.packed = pack_rows(image, first, rows, normalize, scratch(0, rows * inner), faults);
    return left;
}

// s[rows, columns] = cosines with classes from `first` on, a multiple of PANEL; columns is rounded
// up to one, and rows of s are ld apart.
static void products(const LeftRows& left, const Classes& classes, int64_t first, int64_t columns,
                     float* s, int64_t ld) {
    columns = round_up(columns, PANEL);
#if FASTOOD_AMX
    if (classes.split != nullptr) {
        multiply_split(left.split, classes.split + first / PANEL * left.split.slices * SPLIT_SLICE,
                       columns, s, ld);
        if (left.scales != nullptr)
            for (int64_t i = 0; i < left.split.rows; ++i)
                scale_row(s + i * ld, columns, left.scales[i]);
        return;
    }
#endif
    multiply_panels(left.packed, classes.panels + first * left.packed.inner, columns, s, ld);
}
