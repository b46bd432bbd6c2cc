"""Blocks of neurons that are alike: k-means with clusters of equal size."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.extras import require

_ROUNDS = 20


def clustered_order(features: Tensor, num_blocks: int, seed: int) -> Tensor:
    """An order of the neurons in which every I / G neighbours have similar features: k-means with equal sizes.

    Args:
        features: of each neuron, (I, F); G divides I.
        num_blocks: G.
        seed: of the first centres.

    Returns:
        (I,), int64.
    """
    clusters = require("sklearn.cluster", "train", "Cutting an FFN into clustered blocks")
    directions = torch.nn.functional.normalize(features.detach().float(), dim=1)
    first = clusters.KMeans(num_blocks, n_init=1, random_state=seed).fit(directions.cpu().numpy()).cluster_centers_
    centres = torch.from_numpy(first).to(directions)
    labels = torch.full((len(features),), -1, device=features.device)
    for _ in range(_ROUNDS):
        before, labels = labels, assign_evenly(torch.cdist(directions, centres))
        if torch.equal(before, labels):
            break
        centres = torch.stack([directions[labels == block].mean(0) for block in range(num_blocks)])
    return torch.argsort(labels, stable=True)


def assign_evenly(distances: Tensor) -> Tensor:
    """Give each cluster as many members as the others: (N, G) distances -> (N,) labels; G divides N.

    In rounds: whoever has no place asks the nearest cluster that has room, which takes the nearest of those that ask.
    Each round but the last fills a cluster, so there are at most G.
    """
    num_members, num_clusters = distances.shape
    room = [num_members // num_clusters] * num_clusters
    labels = torch.full((num_members,), -1, device=distances.device)
    open_distances = distances.clone()
    while (waiting := (labels < 0).nonzero()[:, 0]).numel():
        nearest, choice = open_distances[waiting].min(1)
        for cluster in choice.unique().tolist():
            asking = choice == cluster
            taken = waiting[asking][torch.argsort(nearest[asking], stable=True)[: room[cluster]]]
            labels[taken] = cluster
            room[cluster] -= len(taken)
            if not room[cluster]:
                open_distances[:, cluster] = torch.inf
    return labels
