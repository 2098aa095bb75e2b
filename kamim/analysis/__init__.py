"""The paper's analyses (section 5, appendix B): attention, frequency and geometry of a model's tokens.

analysed_model  what is analysed: an encoder, by name
attention   softmax weights, computed from q and k beside a model that runs untouched
measures    the numbers: distance, mutual information, spectrum, rank, similarity
collect     streams images through an encoder and keeps what the figures need
embed       t-SNE and PCA, through scikit-learn
figures     pictures, one function each
run         which figures of which models; analysis.json and the page
"""
