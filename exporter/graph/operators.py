"""The operators of domain `pmpd` as ONNX model-local functions: their definition in operators that ONNX Runtime has.

Every graph carries them. ONNX Runtime runs a compiled kernel where one is registered, the function's body otherwise.

The body of `BitplaneMatMul` has only standard operators, so that `onnx.reference` runs it too. It works for any N, K, G
and p, reads all of them from the shapes, and walks the rows in tiles, so that its temporary memory does not grow with
the layer. Because the tiles are cut inside a loop no optimizer can fold the weights into floats ahead of time.

Columns are in bit-major order: column ``8 b + j`` of a row becomes element ``[j, b]``, so that one multiplication by
``2**(7 - j)``, which drops what overflows, brings bit j of every byte to the top. Reordering the few activations to
match is cheaper than reordering the many weights. (In ONNX Runtime 1.31 an addition or multiplication of uint8 takes
0.05 ns an element, a shift or a bitwise operator 0.5.)

That of `BitplaneGather` unpacks the rows that are asked for, all columns in their own order.

That of `GroupQueryAttention` is ONNX Runtime's own operator of the name, between casts to the type of the cache. Models
with sliding windows or softcaps carry a second definition of it that has attributes for both.
"""

from __future__ import annotations

import onnx

__all__ = [
    "BITPLANE_GATHER",
    "BITPLANE_MATMUL",
    "GROUP_QUERY_ATTENTION",
    "PMPD_DOMAIN",
    "PMPD_VERSION",
    "bitplane_gather",
    "bitplane_matmul",
    "group_query_attention",
    "limited_group_query_attention",
]

PMPD_DOMAIN = "pmpd"
BITPLANE_MATMUL = "BitplaneMatMul"
BITPLANE_GATHER = "BitplaneGather"
PMPD_VERSION = 1
GROUP_QUERY_ATTENTION = "GroupQueryAttention"

# Weights unpacked at a time: enough that the loop's own nodes do not show, few enough for the caches.
TILE_WEIGHTS = 1 << 19
# onnx.reference looks up with numpy.choose, which takes fewer than 64 choices; Gather is half as fast but has no limit.
SMALL_TABLE = 32

# Shapes, after the line that makes them: M rows of activations, K columns in B = K/8 bytes, rounded up, W = 8 B columns
# with padding; N outputs in T tiles of R; G codebooks a row, of L = 2^p entries. A name that ends in `_0` is a scalar.
_BODY = """
<domain: "pmpd", opset_import: ["": 23]>
BitplaneMatMul <K> (X, planes, codebook, bias) => (Y)
{
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  seven = Constant <value = int64[1] {7}> ()
  eight = Constant <value = int64[1] {8}> ()
  remaining = Constant <value = int64[1] {-1}> ()
  end_of_axis = Constant <value = int64[1] {9223372036854775807}> ()
  zero_code = Constant <value = uint8[1] {0}> ()
  seven_bits = Constant <value = uint8[1] {7}> ()
  to_top = Constant <value = uint8[8, 1] {128, 64, 32, 16, 8, 4, 2, 1}> ()
  zero_0 = Squeeze (zero)
  one_0 = Squeeze (one)
  columns_0 = Constant <value_int: int = @K> ()
  columns = Reshape (columns_0, one)                            # [1]: K
  outputs = Shape <start = 1, end = 2> (planes)                 # [1]: N
  columns_up = Add (columns, seven)
  row_bytes = Div (columns_up, eight)                           # [1]: B
  width = Mul (row_bytes, eight)                                # [1]: W
  groups = Shape <start = 1, end = 2> (codebook)                # [1]: G
  levels = Shape <start = 2, end = 3> (codebook)                # [1]: L

  # Activations in bit-major order.
  x_rows_shape = Concat <axis = 0> (remaining, columns)
  x_rows = Reshape (X, x_rows_shape)                            # [M, K]
  padding = Sub (width, columns)
  pads = Concat <axis = 0> (zero, zero, zero, padding)
  x_padded = Pad (x_rows, pads)                                 # [M, W]
  x_bytes_shape = Concat <axis = 0> (remaining, row_bytes, eight)
  x_bytes = Reshape (x_padded, x_bytes_shape)                   # [M, B, 8]
  x_bits = Transpose <perm = [0, 2, 1]> (x_bytes)               # [M, 8, B]
  x_shape = Concat <axis = 0> (remaining, width)
  x = Reshape (x_bits, x_shape)                                 # [M, W]

  # Where the codebook of each byte's group starts in a row's table of G * L entries.
  row_bytes_0 = Squeeze (row_bytes)
  byte = Range (zero_0, row_bytes_0, one_0)                     # [B]
  group_bits = Mul (groups, eight)
  group_bits_1 = Sub (group_bits, one)
  columns_up_to_group = Add (columns, group_bits_1)
  bytes_per_group = Div (columns_up_to_group, group_bits)       # [1]
  byte_group = Div (byte, bytes_per_group)                      # [B]
  last_group = Sub (groups, one)
  group = Min (byte_group, last_group)                          # [B]
  group_offset_64 = Mul (group, levels)
  group_offset = Cast <to = 6> (group_offset_64)                # [B] int32
  table_size = Mul (groups, levels)                             # [1]: G * L
  small_table = Constant <value = int64[1] {SMALL_TABLE}> ()
  is_small_1 = LessOrEqual (table_size, small_table)
  is_small = Squeeze (is_small_1)                               # [] bool

  # Tiles of outputs; the last one ends at row N and may overlap the one before.
  tile_weights = Constant <value = int64[1] {TILE_WEIGHTS}> ()
  tile_rows = Div (tile_weights, width)
  tile_rows_1 = Max (tile_rows, one)
  tile = Min (tile_rows_1, outputs)                             # [1]: R
  tile_0 = Squeeze (tile)
  tile_1 = Sub (tile, one)
  outputs_up = Add (outputs, tile_1)
  tiles = Div (outputs_up, tile)                                # [1]: T
  tiles_0 = Squeeze (tiles)
  last_start = Sub (outputs, tile)
  always = Constant <value = bool {1}> ()
  y_tiles = Loop <body = rows (int64 number, bool go_on) => (bool go_on_out, float[m, r] y_tile) {
    go_on_out = Identity (go_on)
    number_1 = Unsqueeze (number, zero)
    start_even = Mul (number_1, tile)
    start = Min (start_even, last_start)
    end = Add (start, tile)
    planes_from = Concat <axis = 0> (start, zero)
    planes_to = Concat <axis = 0> (end, row_bytes)
    planes_axes = Concat <axis = 0> (one, two)
    tile_planes = Slice (planes, planes_from, planes_to, planes_axes)  # [p, R, B] uint8
    tile_codebook = Slice (codebook, start, end, zero)          # [R, G, L] float16
    bytes_shape = Concat <axis = 0> (tile, one, row_bytes)
    bits_shape = Concat <axis = 0> (tile, eight, row_bytes)
    tile_shape = Concat <axis = 0> (tile, width)
    no_codes = Expand (zero_code, bits_shape)                   # [R, 8, B]
    codes = Scan <num_scan_inputs = 1, body = horner (high, plane) => (code) {
      plane_bytes = Reshape (plane, bytes_shape)                # [R, 1, B]
      bit_on_top = Mul (plane_bytes, to_top)                    # [R, 8, B]
      bit = BitShift <direction = "RIGHT"> (bit_on_top, seven_bits)
      doubled = Add (high, high)
      code = Add (doubled, bit)                                 # [R, 8, B] uint8
    }> (no_codes, tile_planes)
    codes_32 = Cast <to = 6> (codes)
    entry_bits = Add (codes_32, group_offset)                   # [R, 8, B] int32
    entry = Reshape (entry_bits, tile_shape)                    # [R, W]: places in the row's table
    values = CastLike (tile_codebook, X)                        # [R, G, L]
    weight = If <
      then_branch = small () => (float[r, w] weight_small) {
        table_shape = Concat <axis = 0> (tile, remaining)
        table = Reshape (values, table_shape)                   # [R, G * L]
        weight_small = GatherElements <axis = 1> (table, entry) # [R, W]
      },
      else_branch = large () => (float[r, w] weight_large) {
        row = Range (zero_0, tile_0, one_0)                     # [R]
        row_offset_64 = Mul (row, table_size)
        row_offset = Cast <to = 6> (row_offset_64)
        row_offset_1 = Unsqueeze (row_offset, one)              # [R, 1] int32
        flat_entry = Add (entry, row_offset_1)                  # [R, W]
        flat_values = Reshape (values, remaining)               # [R * G * L]
        weight_large = Gather <axis = 0> (flat_values, flat_entry)  # [R, W]
      }
    > (is_small)
    y_tile = Gemm <transB = 1> (x, weight)                      # [M, R]
  }> (tiles_0, always)                                          # [T, M, R]

  # Tiles side by side, without what the last one repeats.
  y_tiles_shape = Concat <axis = 0> (tiles, remaining, tile)
  y_by_tile = Reshape (y_tiles, y_tiles_shape)                  # [T, M, R]
  y_by_row = Transpose <perm = [1, 0, 2]> (y_by_tile)           # [M, T, R]
  all_rows = Mul (tiles, tile)
  y_all_shape = Concat <axis = 0> (remaining, all_rows)
  y_all = Reshape (y_by_row, y_all_shape)                       # [M, T * R]
  head_rows = Sub (all_rows, tile)
  tail_start = Sub (head_rows, outputs)
  y_head = Slice (y_all, zero, head_rows, one)                  # [M, (T - 1) R]
  y_tail = Slice (y_all, tail_start, end_of_axis, one)          # [M, N - (T - 1) R]
  y_rows = Concat <axis = 1> (y_head, y_tail)                   # [M, N]

  zero_x = CastLike (zero, X)
  zero_matrix = Unsqueeze (zero_x, zero)                        # [1, 1]
  bias_shape = Concat <axis = 0> (one, outputs)
  zero_row = Expand (zero_matrix, bias_shape)                   # [1, N]
  bias_row = Gemm (zero_matrix, zero_row, bias)                 # [1, N]
  y_biased = Add (y_rows, bias_row)                             # [M, N]
  leading = Shape <start = 0, end = -1> (X)
  y_shape = Concat <axis = 0> (leading, outputs)
  Y = Reshape (y_biased, y_shape)                               # [..., M, N]
}
"""


def bitplane_matmul() -> onnx.FunctionProto:
    """Return ``BitplaneMatMul(X[..., M, K], planes[p, N, S], codebook[N, G, 2^p], bias[N]?) → Y[..., M, N]``.

    Attribute ``K`` is the number of columns. Tiles overlap where N is no multiple of their height: the last one ends at
    row N, and what it repeats is dropped. Gemm's third input is the standard's one optional addend, which is how a
    missing bias becomes a row of zeros.
    """
    body = _BODY.replace("TILE_WEIGHTS", str(TILE_WEIGHTS)).replace("SMALL_TABLE", str(SMALL_TABLE))
    return onnx.parser.parse_function(body)


# Shapes: M ids; K columns in B = K/8 bytes, rounded up; G codebooks a row, of L = 2^p entries.
_GATHER_BODY = """
<domain: "pmpd", opset_import: ["": 23]>
BitplaneGather <K> (ids, planes, codebook) => (Y)
{
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  seven = Constant <value = int64[1] {7}> ()
  eight = Constant <value = int64[1] {8}> ()
  remaining = Constant <value = int64[1] {-1}> ()
  zero_code = Constant <value = uint8[1] {0}> ()
  seven_bits = Constant <value = uint8[1] {7}> ()
  to_top = Constant <value = uint8[8] {128, 64, 32, 16, 8, 4, 2, 1}> ()
  zero_0 = Squeeze (zero)
  one_0 = Squeeze (one)
  columns_0 = Constant <value_int: int = @K> ()
  columns = Reshape (columns_0, one)                            # [1]: K
  columns_up = Add (columns, seven)
  row_bytes = Div (columns_up, eight)                           # [1]: B
  row_bytes_0 = Squeeze (row_bytes)
  groups = Shape <start = 1, end = 2> (codebook)                # [1]: G
  levels = Shape <start = 2, end = 3> (codebook)                # [1]: L
  rows = Size (ids)
  rows_1 = Reshape (rows, one)                                  # [1]: M
  row_ids = Reshape <allowzero = 1> (ids, rows_1)               # [M]

  # The codes of the rows.
  all_bytes = Gather <axis = 1> (planes, row_ids)               # [p, M, S]
  used_bytes = Slice (all_bytes, zero, row_bytes, two)          # [p, M, B]
  bytes_shape = Concat <axis = 0> (rows_1, row_bytes, one)
  bits_shape = Concat <axis = 0> (rows_1, row_bytes, eight)
  no_codes = Expand (zero_code, bits_shape)                     # [M, B, 8]
  codes = Scan <num_scan_inputs = 1, body = horner (high, plane) => (code) {
    plane_bytes = Reshape <allowzero = 1> (plane, bytes_shape)  # [M, B, 1]
    bit_on_top = Mul (plane_bytes, to_top)                      # [M, B, 8]
    bit = BitShift <direction = "RIGHT"> (bit_on_top, seven_bits)
    doubled = Add (high, high)
    code = Add (doubled, bit)                                   # [M, B, 8] uint8
  }> (no_codes, used_bytes)

  # Their places in the table of all rows' codebooks.
  byte = Range (zero_0, row_bytes_0, one_0)                     # [B]
  group_bits = Mul (groups, eight)
  group_bits_1 = Sub (group_bits, one)
  columns_up_to_group = Add (columns, group_bits_1)
  bytes_per_group = Div (columns_up_to_group, group_bits)       # [1]
  byte_group = Div (byte, bytes_per_group)                      # [B]
  last_group = Sub (groups, one)
  group = Min (byte_group, last_group)                          # [B]
  group_offset = Mul (group, levels)
  group_offset_1 = Unsqueeze (group_offset, one)                # [B, 1]
  rows_0 = Squeeze (rows_1)
  row = Range (zero_0, rows_0, one_0)                           # [M]
  table_size = Mul (groups, levels)                             # [1]: G * L
  row_offset = Mul (row, table_size)
  row_axes = Concat <axis = 0> (one, two)
  row_offset_2 = Unsqueeze (row_offset, row_axes)               # [M, 1, 1]
  codes_64 = Cast <to = 7> (codes)
  entry_in_row = Add (codes_64, group_offset_1)                 # [M, B, 8]
  entry = Add (entry_in_row, row_offset_2)                      # [M, B, 8] int64

  row_codebooks = Gather <axis = 0> (codebook, row_ids)         # [M, G, L] float16
  table_16 = Reshape (row_codebooks, remaining)                 # [M * G * L]
  table = Cast <to = 1> (table_16)
  values = Gather <axis = 0> (table, entry)                     # [M, B, 8]
  width = Mul (row_bytes, eight)                                # [1]: 8 B
  wide_shape = Concat <axis = 0> (rows_1, width)
  wide = Reshape <allowzero = 1> (values, wide_shape)           # [M, 8 B]
  y = Slice (wide, zero, columns, one)                          # [M, K]
  leading = Shape (ids)
  y_shape = Concat <axis = 0> (leading, columns)
  Y = Reshape <allowzero = 1> (y, y_shape)                      # [..., K]
}
"""


def bitplane_gather() -> onnx.FunctionProto:
    """Return ``BitplaneGather(ids[...], planes[p, N, S], codebook[N, G, 2^p]) → Y[..., K]``.

    Row ``ids[i]`` of the weights that planes and codebook stand for, in float32: what a model reads of an embedding
    that is tied to its output layer. Attribute ``K`` is the number of columns. Ids are int64 and may be -N to N - 1,
    as those of Gather; others are an error.
    """
    return onnx.parser.parse_function(_GATHER_BODY)


# Cast and not CastLike, which is itself a function: ONNX Runtime would run what it expands to after all other nodes
# that are ready, in the verification the casts of all weights.
_ATTENTION_BODY = """
<domain: "pmpd", opset_import: ["": 23, "com.microsoft": 1]>
GroupQueryAttention <num_heads, kv_num_heads, scale>
(qkv, past_key, past_value, last_position, total, cos, sin) => (Y, present_key, present_value)
{
  qkv_16 = Cast <to = 10> (qkv)  # [1, M, (H + 2 G) D] float16
  cos_16 = Cast <to = 10> (cos)  # [P, pairs]
  sin_16 = Cast <to = 10> (sin)
  y_16, present_key, present_value = com.microsoft.GroupQueryAttention <
    do_rotary = 1, num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale
  > (qkv_16, "", "", past_key, past_value, last_position, total, cos_16, sin_16)
  Y = Cast <to = 1> (y_16)  # [1, M, H D] float32
}
"""


def group_query_attention() -> onnx.FunctionProto:
    """Return ``GroupQueryAttention(qkv, past_key, past_value, last_position, total, cos, sin)``.

    Attention of M new tokens over a float16 cache of C slots, which it extends: queries and keys are rotated, keys and
    values rounded to the cache's type, scores times ``scale`` masked causally.

    * qkv float32 ``[1, M, (H + 2 G) D]``: H = ``num_heads`` queries, G = ``kv_num_heads`` keys and as many values;
    * past_key, past_value, present_key, present_value float16 ``[1, G, C, D]``: the present may be the past's memory;
    * last_position int32 ``[1]``: positions that are valid after this run, less one; total int32: C;
    * cos, sin float32 ``[P, pairs]``: element i < pairs of a head is rotated with element pairs + i;
    * Y float32 ``[1, M, H D]``.

    A kernel computes in float32 throughout. This body computes with as much precision as ONNX Runtime's operator does,
    from queries and rotary tables that are rounded to the cache's type.
    """
    return onnx.parser.parse_function(_ATTENTION_BODY)


# A window is a bias on the scores and not the operator's local_window_size, which has two meanings: up to ONNX Runtime
# 1.23 it did not count the query's own position, since 1.24 it does. The bias is added behind the softcap.
_LIMITED_ATTENTION_BODY = """
<domain: "pmpd", opset_import: ["": 23, "com.microsoft": 1]>
GroupQueryAttention <num_heads, kv_num_heads, scale, window: int = 0, softcap: float = 0.0>
(qkv, past_key, past_value, last_position, total, cos, sin) => (Y, present_key, present_value)
{
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  zero_0 = Squeeze (zero)
  one_0 = Squeeze (one)
  tokens = Shape <start = 1, end = 2> (qkv)                     # [1]: M
  last = Cast <to = 7> (last_position)
  end = Add (last, one)
  start = Sub (end, tokens)
  start_0 = Squeeze (start)
  end_0 = Squeeze (end)
  total_64 = Cast <to = 7> (total)
  query_row = Range (start_0, end_0, one_0)                     # [M] positions
  query = Unsqueeze (query_row, one)                            # [M, 1]
  key = Range (zero_0, total_64, one_0)                         # [C] positions
  distance = Sub (query, key)                                   # [M, C]
  window = Constant <value_int: int = @window> ()
  is_far = GreaterOrEqual (distance, window)
  has_window = Greater (window, zero_0)
  is_hidden = And (is_far, has_window)                          # [M, C] bool
  seen_32 = Constant <value_float: float = 0.0> ()
  hidden_32 = Constant <value_float: float = -inf> ()
  seen = Cast <to = 10> (seen_32)
  hidden = Cast <to = 10> (hidden_32)
  bias_rows = Where (is_hidden, hidden, seen)                   # [M, C] float16
  bias_axes = Concat <axis = 0> (zero, one)
  bias = Unsqueeze (bias_rows, bias_axes)                       # [1, 1, M, C]
  qkv_16 = Cast <to = 10> (qkv)  # [1, M, (H + 2 G) D] float16
  cos_16 = Cast <to = 10> (cos)  # [P, pairs]
  sin_16 = Cast <to = 10> (sin)
  y_16, present_key, present_value = com.microsoft.GroupQueryAttention <
    do_rotary = 1, num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale,
    softcap: float = @softcap
  > (qkv_16, "", "", past_key, past_value, last_position, total, cos_16, sin_16, "", bias)
  Y = Cast <to = 1> (y_16)  # [1, M, H D] float32
}
"""


def limited_group_query_attention() -> onnx.FunctionProto:
    """Return `group_query_attention` with two more attributes, for models that use one of them.

    * ``window``: a query sees itself and the ``window - 1`` positions before it, as in transformers; 0: all of them;
    * ``softcap``: scores s become ``softcap * tanh(s / softcap)``; 0: they stay.

    A node without them means the same as under the other definition.
    """
    return onnx.parser.parse_function(_LIMITED_ATTENTION_BODY)
