"""Grouped-query attention behind one function."""

import jax
import jax.numpy as jnp


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention of `N` query heads over `K` key/value heads, `N` a multiple of `K`.

    Scores and softmax are float32 whatever the dtype of the inputs. A query that may see no key
    (padding) returns the mean of the values, a finite number that nothing reads.

    Args:
        q_BTNH: queries.
        k_BKSH: keys, heads before positions as the cache stores them.
        v_BKSH: values, likewise.
        mask_BTS: True where query `t` may see key `s`.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH).reshape(B, T, N, H)
