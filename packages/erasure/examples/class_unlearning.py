"""Make a digit classifier forget the fours, and see by which strokes it knew them."""

# %% The digits that scikit-learn ships: 1797 images of 8x8 pixels.
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from unweave.erasure.class_unlearning import (
    ClassRequest,
    ClassUnlearner,
    ClassUnlearningConfig,
    ConceptSamples,
    accuracy,
    class_scores,
    kl_from_retrained,
    relearning_steps,
)

TARGET = 4
pixels, digits = load_digits(return_X_y=True)
split = train_test_split(pixels / 16, digits, test_size=0.3, stratify=digits, random_state=0)
train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
train_y, test_y = (torch.tensor(part) for part in split[2:])
own = train_y == TARGET


# %% A classifier, and one that was never shown a four: what the first should become.
def trained(inputs: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    """Train a perceptron with two hidden layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        batch = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


model, retrained = trained(train_x, train_y), trained(train_x[~own], train_y[~own])

# %% Concepts: the strokes of a seven-segment display. Images with most ink there, and with least.
SEGMENTS = {
    "top stroke": (slice(0, 2), slice(2, 6)),
    "middle stroke": (slice(3, 5), slice(2, 6)),
    "bottom stroke": (slice(6, 8), slice(2, 6)),
    "upper left": (slice(1, 4), slice(1, 3)),
    "upper right": (slice(1, 4), slice(5, 7)),
    "lower left": (slice(4, 7), slice(1, 3)),
    "lower right": (slice(4, 7), slice(5, 7)),
    "hole above": (slice(2, 3), slice(3, 5)),
    "hole below": (slice(5, 6), slice(3, 5)),
}
concepts = {}
for name, (rows, columns) in SEGMENTS.items():
    order = train_x.reshape(-1, 8, 8)[:, rows, columns].mean((1, 2)).argsort(descending=True)
    concepts[name] = ConceptSamples(train_x[order[:100]], train_x[order[-100:]])

# %% Unlearn: the fours are answered as the class most like them without their own concepts.
request = ClassRequest(str(TARGET), tuple("0123456789"), train_x[own], train_x[~own], train_y[~own])
config = ClassUnlearningConfig(
    optimizer="adamw",
    lr=1e-3,
    epochs=40,
    recovery_epochs=20,
    batch_size=32,
    retain_fraction=1.0,
    max_retain_drop=1.0,
)
unlearning = ClassUnlearner(config).unlearn(model, request, concepts, head="4")


# %% Before, after, and what retraining gives.
def row(name: str, judged: nn.Module) -> str:
    """Return the scores of one model as a line of the table."""
    scores = class_scores(judged, (train_x, train_y), (test_x, test_y), TARGET)
    divergence = kl_from_retrained(retrained, judged, test_x[test_y == TARGET])
    back = relearning_steps(judged, train_x, train_y, class_index=TARGET, lr=0.01)
    return (
        f"{name:<11}{scores.forget_test:>8.1%}{scores.retain_test:>9.1%}"
        f"{scores.called_non_member:>9.1%}{divergence:>7.2f}{back:>7}"
    )


print(f"{'':<11}{'fours':>8}{'others':>9}{'unseen':>9}{'KL':>7}{'steps':>7}")
print(row("before", model))
with unlearning.apply(model):
    print(row("unlearned", model))
print(row("retrained", retrained))
print("undone:", f"{accuracy(model, test_x[test_y == TARGET], test_y[test_y == TARGET]):.1%}")

# %% Which concepts carried the fours, and what is still in the features.
report = unlearning.report
for entry in sorted(report.concepts, key=lambda entry: -entry.importance):
    print(f"{'*' if entry.chosen else ' '} {entry.name:<14}{entry.importance:>7.3f}")
print("answers:", dict(report.answers))
print("facts:", dict(report.facts))
