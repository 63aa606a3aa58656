"""Attention heads as passes see them: which weight rows make each head, how heads merge, how the Program follows."""
