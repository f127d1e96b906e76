"""What each primitive of JAX means to relevance: one decision per primitive, by name.

The sets answer three questions. Is the primitive elementwise, so that it can be a part of an activation? Is it linear
in its live operands, so that its plain VJP is LRP-0? Does it merely move or select elements, so that it can carry
relative tangents as they are? A primitive that is in none of the sets is refused by the planner (`UnknownPrimitiveError`).
"""

from .jaxprs import REMAT

# Elementwise, nonlinear (or linear in one operand only): parts of activations.
NONLINEAR = frozenset(
    "abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt clamp cos cosh digamma erf erf_inv "
    "erfc exp exp2 expm1 igamma igammac integer_pow lgamma log log1p log2 logistic max min one_minus_square polygamma "
    "polynomial pow regularized_incomplete_beta rem rsqrt select_n sin sinh sqrt square tan tanh".split()
)
# Elementwise and linear in a single live operand (`div`: in its numerator).
LINEAR = frozenset("add sub mul div neg convert_element_type copy copy_p reduce_precision real add_any".split())
# Elementwise with a derivative of 0: what depends on them carries no relevance, but they may sit inside an activation
# (`where(x > 0, ...)`, `sign(x) * ...`, `x - floor(x)`).
PIECEWISE_CONSTANT = frozenset(
    "and ceil eq eq_to floor ge gt is_finite le le_to lt lt_to ne nextafter not or population_count round sign xor "
    "shift_left shift_right_arithmetic shift_right_logical clz mulhi".split()
)
ELEMENTWISE = NONLINEAR | LINEAR | PIECEWISE_CONSTANT

# Mixing primitives: with one live operand they are the heart of an affine layer.
MIXING = {"dot_general": "dense", "conv_general_dilated": "conv", "ragged_dot_general": "affine"}

# Each output element is one input element (or a constant): relative tangents go through as they are.
SELECTION = frozenset(
    "all_gather all_gather_invariant all_gather_reduced all_to_all approx_top_k broadcast_in_dim clamp concatenate "
    "convert_element_type copy copy_p cummax cummin device_put dynamic_slice dynamic_update_slice expand_dims gather "
    "global_array_to_host_local_array host_local_array_to_global_array "
    "layout_constraint max min name optimization_barrier pad pbroadcast pbroadcast_dynamic ppermute preduced pvary "
    "ragged_all_to_all reduce_max reduce_min reduce_precision reduce_window_max reduce_window_min "
    "reduced_vary_cast reduced_vary_cast_p relayout reshape reshard rev scatter select_and_gather_add select_n "
    "sharding_constraint slice sort split squeeze stack tie tile top_k transpose unstack vary_unreduced_cast "
    "vary_unreduced_cast_p with_memory_space_constraint".split()
)
# Linear in all live operands together: the plain VJP conserves relevance.
SUMMATION = frozenset(
    "add add_any complex conj cumsum fft imag neg psum psum2 psum_invariant real reduce_scatter reduce_sum "
    "reduce_window_sum scatter-add scatter-sub scatter_add select_and_scatter_add sub unreduced_psum "
    "unreduced_reduce_scatter".split()
)
STRUCTURAL = SELECTION | SUMMATION

# Linear in the right-hand side alone, which is the last operand.
SOLVES = frozenset({"triangular_solve", "tridiagonal_solve"})

MAX_POOL = frozenset({"reduce_window_max", "reduce_max"})
SUM_POOL = frozenset({"reduce_window_sum", "reduce_sum"})
# Products over many live elements; the VJP is divided by their number.
PRODUCTS = frozenset({"reduce_prod", "cumprod"})
PURE_RESHAPE = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type rev copy copy_p".split()
)
SCALES = frozenset({"mul", "div", "neg"})
SHIFTS = frozenset({"add", "sub", "add_any"})
# Sums over the devices of a mesh axis, in a `shard_map`: they complete a product whose contracted axis is split.
DEVICE_SUMS = frozenset({"psum", "psum2", "psum_invariant"})
# Functions with a backward pass of their own around a kernel that cannot be read; see `jaxprs`.
KERNELS = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr"})
CALLS = frozenset({"scan", "while", "cond", "shard_map"}) | REMAT

# Outputs without a tangent: whatever they depend on, no relevance flows through them.
DISCRETE = PIECEWISE_CONSTANT | frozenset(
    "after_all argmax argmin axis_index bitcast_convert_type check create_token dce_sink debug_callback debug_print "
    "from_edtype inspect_sharding iota random_bits random_fold_in random_gamma random_seed random_split "
    "random_unwrap random_wrap reduce_and reduce_or reduce_xor rng_bit_generator rng_uniform stop_gradient threefry2x32 "
    "to_edtype".split()
)

# Differentiable, but covered by no general mechanism. The list keeps the decisions on record, with the reason that
# the error gives.
_DECOMPOSITION = "a matrix decomposition has no accepted propagation rule"
_OUTSIDE = "what runs outside of JAX cannot be read"
_REDUCTION = "a nonlinear reduction or scatter has no accepted propagation rule"
_REFERENCE = "mutable references have no jaxpr-level value that could carry relevance"
_INTERNAL = "it has no meaning outside of JAX's own transformations"
REFUSED = {
    **dict.fromkeys("cholesky eig eigh hessenberg householder_product lu qr schur svd tridiagonal".split(), _DECOMPOSITION),
    **dict.fromkeys("custom_linear_solve linear_solve".split(), "the solver's operator is a function of its own"),
    **dict.fromkeys("ffi_call io_callback pure_callback pallas_call tpu_custom_call".split(), _OUTSIDE),
    **dict.fromkeys(
        "cumlogsumexp reduce reduce_window scatter-max scatter-min scatter-mul scatter_max scatter_min scatter_mul "
        "select_and_scatter".split(),
        _REDUCTION,
    ),
    **dict.fromkeys(
        "accum_grad_in_ref addupdate box_get box_set empty_ref empty2 free_ref freeze get log_extend log_read "
        "new_box new_log new_ref run_state swap".split(),
        _REFERENCE,
    ),
    **dict.fromkeys("call_hi_primitive linear_call remat_opt stage".split(), _INTERNAL),
}
KNOWN = ELEMENTWISE | frozenset(MIXING) | STRUCTURAL | SOLVES | PRODUCTS | CALLS | KERNELS | DISCRETE | frozenset(REFUSED)
