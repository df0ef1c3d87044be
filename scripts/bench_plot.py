def plot(medians): return ""
