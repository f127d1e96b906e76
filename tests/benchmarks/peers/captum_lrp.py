"""captum: `captum.attr.LRP`, which registers its hooks, runs the network twice and restores its weights in every call.

Its Alpha1_Beta0 clips weights and does not look at the sign of the input: above a relu and without biases it is the rule of
the literature. Batch norm has no such rule there, and relu6 no rule at all.
"""

import functools

import torch
from captum.attr import LRP
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

from . import torch_convolutional
from .torch_convolutional import FAMILY  # noqa: F401

RULES = {
    "Epsilon": lambda: EpsilonRule(1e-6),
    "alpha1_beta0 (captum's)": lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
}


def relevances(problem):
    return {name: functools.partial(_prepare, problem, name) for name in RULES}


def _prepare(problem, name):
    model, x = torch_convolutional.model(problem), torch_convolutional.image(problem)
    for module in model.modules():
        if isinstance(module, torch_convolutional.Residual):
            module.add = Addition_Module()
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    others = [module for module in model.modules() if isinstance(module, torch_convolutional.Flatten | torch.nn.Linear)]
    target = torch.tensor(problem.target, dtype=torch.int64)

    def run():
        for module in (convolutions[0], *others):
            module.rule = EpsilonRule(1e-6)
        for module in convolutions[1:]:  # rules are taken away after each call
            module.rule = RULES[name]()
        return torch_convolutional.as_ours(LRP(model).attribute(x, target))

    return run
