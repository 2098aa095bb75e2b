"""The paper's analyses (section 5, appendix B): attention, frequency and geometry of a model's tokens.

request     what is asked for, and its images, checked without torch
plan        the models that each figure can show
analysed_model  an encoder with its name in figures
attention   softmax weights, computed from q and k beside a model that runs untouched
measures    distance, mutual information, spectrum, rank, similarity
collect     streams images through an encoder and keeps the inputs of the figures
embed       t-SNE and PCA, through scikit-learn
figures     pictures, one function each
run         draws the planned figures; writes analysis.json and the page
"""
