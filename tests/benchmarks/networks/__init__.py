"""The networks: full size, random weights, plain JAX. Peers rebuild them from what a `Problem` says of itself."""

from . import convolutional, recurrent, transformers

# Each builds a Problem: build(short, batch), `batch` None for its own.
NETWORKS = convolutional.NETWORKS | transformers.NETWORKS | recurrent.NETWORKS
