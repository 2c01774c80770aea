"""torch.func: per-sample gradients, ensembles, Jacobians and forward mode, as any model of torch's own operators has
them.
"""

import pytest
import torch
from tiny import FULL, LINEAR, output_and_gradients, tiny_model, tokens
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

from modeling_deltanet.delta_rule import torch_chunk_delta_rule


LAYERS = {
    "all_linear": {"layer_types": [LINEAR] * 2},
    "hybrid": {"layer_types": [LINEAR, FULL]},
    "decay": {"layer_types": [LINEAR], "linear_use_decay": True},
}
LENGTHS = [70, 3]  # two chunks; token by token
# torch says so of its own attention under vmap on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def setup(layers="all_linear"):
    model = tiny_model(**LAYERS[layers]).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, ids):
        return functional_call(model, parameters, (ids[None],), {"labels": ids[None], "use_cache": False}).loss

    return model, parameters, loss


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layers", LAYERS)
def test_per_sample_gradients(layers, length):
    """Differential privacy, influence functions and gradient statistics would be refused for this model alone."""
    model, parameters, loss = setup(layers)
    x = tokens(3, length)
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, ids in enumerate(x):
        _, gradients = output_and_gradients(model, input_ids=ids[None], labels=ids[None], use_cache=None)
        for name, gradient in gradients.items():
            torch.testing.assert_close(together[name][i], gradient, msg=name)


def test_an_ensemble_in_one_call():
    """Several models of one shape could not be run side by side."""
    models = [tiny_model(**LAYERS["all_linear"], seed=seed).double() for seed in range(2)]
    x = tokens(1, 70)
    parameters, buffers = stack_module_state(models)

    def logits(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (x,), {"use_cache": False}).logits

    torch.testing.assert_close(
        vmap(logits)(parameters, buffers), torch.stack([model(x).logits for model in models]), check_stride=False
    )


def test_forward_mode_and_second_order():
    """A Jacobian-vector product, or a Hessian's, would be refused."""
    model, parameters, _ = setup()  # all linear: torch's fused attention has no forward mode
    name, (x,) = "model.layers.0.linear_attn.k_proj.weight", tokens(1, 70)
    torch.manual_seed(0)
    v, weight = torch.randn_like(parameters[name]), parameters[name]

    def of_weight(weight):  # Transformers computes its loss in fp32
        logits = functional_call(model, parameters | {name: weight}, (x[None],), {"use_cache": False}).logits
        return logits.log_softmax(-1)[..., 0].sum()

    _, directional = jvp(of_weight, (weight,), (v,))
    gradient, hessian_times_v = jvp(grad(of_weight), (weight,), (v,))
    torch.testing.assert_close(jacrev(of_weight)(weight), gradient)
    torch.testing.assert_close(directional, (gradient * v).sum())
    step = 1e-5
    difference = (grad(of_weight)(weight + step * v) - grad(of_weight)(weight - step * v)) / (2 * step)
    torch.testing.assert_close(hessian_times_v, difference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 70, 71]], ids=["batch", "packed"])
def test_the_rule_itself(cu_seqlens):
    """A layer of somebody's own, that calls the rule, would be differentiated to something else, or be refused."""
    torch.manual_seed(0)
    B, cu_seqlens = (2, None) if cu_seqlens is None else (1, torch.tensor(cu_seqlens))
    q, k, v = (torch.randn(B, 71, heads, 8, dtype=torch.double) for heads in (1, 1, 2))
    beta, h0 = torch.rand(B, 71, 2, dtype=torch.double), torch.randn(3 if B == 1 else B, 2, 8, 8, dtype=torch.double)

    def loss(*tensors):
        *inputs, h0 = tensors
        o, state = torch_chunk_delta_rule(*inputs, None, h0, True, True, cu_seqlens)
        return o.square().sum() + state.pow(3).sum()

    inputs = [x.requires_grad_() for x in (q, k, v, beta, h0)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(grad(loss, argnums=tuple(range(5)))(*(x.detach() for x in inputs)), expected, strict=True):
        torch.testing.assert_close(a, b)
