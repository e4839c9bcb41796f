"""VOLO trained with MixToken.

Source: "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (Jiang et al., NeurIPS 2021,
arXiv:2104.10858), section 3.2. Each image of a batch gets a box of tokens from its partner, the image at the same place
from the batch's end; the logits of these tokens are given back to it, so that each token is classified as the image it
is from. timm's VOLO has both steps, but outside of `forward`, which is all that DistributedDataParallel and compile
call.
"""

from timm.models.volo import VOLO
from torch import Tensor


class MixTokenVOLO(VOLO):
    """In training, images B C H W become
    logits (B, classes) of images that are mixed,
    logits (B, tokens, classes) of each image's own tokens, and
    the share of the tokens of an image that are its own, a number for the whole batch.
    In evaluation it is VOLO."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, float]:
        if not self.training:
            return super().forward(x)
        features, token_logits, (top, left, bottom, right) = self.forward_train(x)
        own = 1 - (bottom - top) * (right - left) / token_logits.shape[1]
        return self.head(self.head_drop(features)), token_logits, own
