"""PLACEHOLDER"""

import torch


def outlier_columns(st, f):
    return st.absmax.topk(max(1, round(f * len(st.absmax)))).indices.sort().values


def low_rank_correction(error, gram, rank):
    L = torch.linalg.cholesky(gram.double() + 0.01 * gram.diag().mean().double() * torch.eye(len(gram)))
    u, s, v = torch.linalg.svd(error.double() @ L, full_matrices=False)
    return (u[:, :rank] * s[:rank]).float(), (v[:rank] @ torch.linalg.inv(L)).float()
