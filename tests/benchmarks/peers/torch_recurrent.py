"""The LSTM: torch's own for the gradient, and a loop whose input times gradient is the relevance of Arras et al. 2017.

No library explains an LSTM; in torch one writes the loop, and detaches what the rule holds constant.
"""

import torch

FAMILY = "recurrent"
EPSILON = 1e-3  # as in rp.presets.lstm


def _tensors(problem):
    params = {name: {key: torch.tensor(value) for key, value in p.items()} for name, p in problem.params.items()}
    return params, torch.tensor(problem.x, requires_grad=True), torch.tensor(problem.target, dtype=torch.int64)[:, None]


def gradient(problem):
    params, x, target = _tensors(problem)
    (kernel, bias), head, features = params["cell"].values(), params["head"], x.shape[-1]
    module = torch.nn.LSTM(features, head["kernel"].shape[0], batch_first=True).requires_grad_(False)
    of_x, of_h = kernel[:features].T, kernel[features:].T
    weights = {"weight_ih_l0": of_x, "weight_hh_l0": of_h, "bias_ih_l0": bias, "bias_hh_l0": torch.zeros_like(bias)}
    module.load_state_dict(weights)

    def run():
        logits = module(x)[0][:, -1] @ head["kernel"] + head["bias"]
        (found,) = torch.autograd.grad(logits.gather(1, target).sum(), x)
        return found.numpy()

    return run


def with_slope(value, slope, z):
    """`value`, with the derivative `slope` by `z`."""
    linear = slope.detach() * z
    return linear + (value - linear).detach()


def stabilize(z):
    return z + torch.where(z < 0, -EPSILON, EPSILON)


def relevances(problem):
    return {"lstm": lambda: _prepare(problem)}


def _prepare(problem):
    params, x, target = _tensors(problem)
    (kernel, bias), head = params["cell"].values(), params["head"]
    units = len(bias) // 4
    of_gates = torch.cat([kernel[:, : 2 * units], kernel[:, 3 * units :]], 1)
    bias_of_gates = torch.cat([bias[: 2 * units], bias[3 * units :]])
    of_g, bias_of_g = kernel[:, 2 * units : 3 * units].contiguous(), bias[2 * units : 3 * units]

    def run():
        h = c = torch.zeros(x.shape[0], units)
        for t in range(x.shape[1]):
            inputs = torch.cat([x[:, t], h], 1)
            i, f, o = torch.sigmoid(inputs.detach() @ of_gates + bias_of_gates).chunk(3, 1)
            z = inputs @ of_g + bias_of_g
            g = torch.tanh(z)
            c = f * c + i * with_slope(g, g / stabilize(z), z)
            y = torch.tanh(c)
            h = o * with_slope(y, torch.where(c == 0, 1, y / c), c)
        z = h @ head["kernel"] + head["bias"]
        logits = with_slope(z, z / stabilize(z), z)
        (found,) = torch.autograd.grad(logits.gather(1, target).sum(), x)
        return (found * x).detach().numpy()

    return run
