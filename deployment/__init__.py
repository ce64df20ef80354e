"""From a checkpoint to a file that runs elsewhere: trained weights in, verified files out.

options.py      options that commands share
weights.py      a network with a checkpoint's weights, and what its user must know
verify.py       write a file, run it, compare it
formats.py      TorchScript, torch.export, ONNX, state dicts
quantised.py    int8 ONNX, calibrated on images
executorch.py   ExecuTorch, with XNNPACK
coreml.py       Core ML
coreml_eval.py  Core ML's programs, operator by operator, where Core ML is not
accuracy.py     accuracy of a fused file
prediction.py   classes of images in files and folders
"""
